"""Evolved Transformer: a block found by search, of attention beside convolutions, registered with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
)

from .cache_evolved_transformer import EvolvedTransformerCache
from .configuration_evolved_transformer import EvolvedTransformerConfig
from .heads_evolved_transformer import EvolvedTransformerForSequenceClassification
from .language_models_evolved_transformer import (
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
)
from .modeling_evolved_transformer import (
    EvolvedTransformerEncoderModel,
    EvolvedTransformerModel,
    EvolvedTransformerPreTrainedModel,
)
from .outputs_evolved_transformer import EvolvedTransformerCausalLMOutput, EvolvedTransformerSeq2SeqLMOutput

MODELS = {
    AutoModel: EvolvedTransformerModel,
    AutoModelForCausalLM: EvolvedTransformerForCausalLM,
    AutoModelForPreTraining: EvolvedTransformerForConditionalGeneration,
    AutoModelForSeq2SeqLM: EvolvedTransformerForConditionalGeneration,
    AutoModelForSequenceClassification: EvolvedTransformerForSequenceClassification,
    AutoModelForTextEncoding: EvolvedTransformerEncoderModel,
}

AutoConfig.register(EvolvedTransformerConfig.model_type, EvolvedTransformerConfig)
for auto_class, model_class in MODELS.items():
    auto_class.register(EvolvedTransformerConfig, model_class)

__all__ = [
    "EvolvedTransformerCache",
    "EvolvedTransformerCausalLMOutput",
    "EvolvedTransformerConfig",
    "EvolvedTransformerEncoderModel",
    "EvolvedTransformerForCausalLM",
    "EvolvedTransformerForConditionalGeneration",
    "EvolvedTransformerForSequenceClassification",
    "EvolvedTransformerModel",
    "EvolvedTransformerPreTrainedModel",
    "EvolvedTransformerSeq2SeqLMOutput",
]
