"""Universal Transformer: recurrence over depth with adaptive halting, registered with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from .cache_universal_transformer import UniversalTransformerCache
from .configuration_universal_transformer import UniversalTransformerConfig
from .heads_universal_transformer import (
    UniversalTransformerForMaskedLM,
    UniversalTransformerForQuestionAnswering,
    UniversalTransformerForSequenceClassification,
    UniversalTransformerForTokenClassification,
    UniversalTransformerMaskedLMOutput,
    UniversalTransformerQuestionAnsweringOutput,
    UniversalTransformerSequenceClassifierOutput,
    UniversalTransformerTokenClassifierOutput,
)
from .language_models_universal_transformer import (
    UniversalTransformerForCausalLM,
    UniversalTransformerForConditionalGeneration,
)
from .modeling_universal_transformer import (
    UniversalTransformerEncoderModel,
    UniversalTransformerModel,
    UniversalTransformerPreTrainedModel,
)
from .outputs_universal_transformer import (
    UniversalTransformerCausalLMOutput,
    UniversalTransformerOutput,
    UniversalTransformerSeq2SeqLMOutput,
    UniversalTransformerSeq2SeqOutput,
)

MODELS = {
    AutoModel: UniversalTransformerModel,
    AutoModelForCausalLM: UniversalTransformerForCausalLM,
    AutoModelForMaskedLM: UniversalTransformerForMaskedLM,
    AutoModelForPreTraining: UniversalTransformerForConditionalGeneration,
    AutoModelForQuestionAnswering: UniversalTransformerForQuestionAnswering,
    AutoModelForSeq2SeqLM: UniversalTransformerForConditionalGeneration,
    AutoModelForSequenceClassification: UniversalTransformerForSequenceClassification,
    AutoModelForTextEncoding: UniversalTransformerEncoderModel,
    AutoModelForTokenClassification: UniversalTransformerForTokenClassification,
}

AutoConfig.register(UniversalTransformerConfig.model_type, UniversalTransformerConfig)
for auto_class, model_class in MODELS.items():
    auto_class.register(UniversalTransformerConfig, model_class)

__all__ = [
    "UniversalTransformerCache",
    "UniversalTransformerCausalLMOutput",
    "UniversalTransformerConfig",
    "UniversalTransformerEncoderModel",
    "UniversalTransformerForCausalLM",
    "UniversalTransformerForConditionalGeneration",
    "UniversalTransformerForMaskedLM",
    "UniversalTransformerForQuestionAnswering",
    "UniversalTransformerForSequenceClassification",
    "UniversalTransformerForTokenClassification",
    "UniversalTransformerMaskedLMOutput",
    "UniversalTransformerModel",
    "UniversalTransformerOutput",
    "UniversalTransformerPreTrainedModel",
    "UniversalTransformerQuestionAnsweringOutput",
    "UniversalTransformerSeq2SeqLMOutput",
    "UniversalTransformerSeq2SeqOutput",
    "UniversalTransformerSequenceClassifierOutput",
    "UniversalTransformerTokenClassifierOutput",
]
