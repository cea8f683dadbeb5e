"""Transformer-XL: recurrence in length. Importing this registers it with the Auto classes as `transfo-xl`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache_transformer_xl import TransformerXLCache
from .configuration_transformer_xl import TransformerXLConfig
from .modeling_transformer_xl import (
    TransformerXLCausalLMOutput,
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLForTokenClassification,
    TransformerXLModel,
    TransformerXLPreTrainedModel,
)
from .tokenization_transformer_xl import TransformerXLTokenizer, TransfoXLTokenizer

AutoConfig.register(TransformerXLConfig.model_type, TransformerXLConfig)
AutoModel.register(TransformerXLConfig, TransformerXLModel)
AutoModelForCausalLM.register(TransformerXLConfig, TransformerXLForCausalLM)
AutoModelForSequenceClassification.register(TransformerXLConfig, TransformerXLForSequenceClassification)
AutoModelForTokenClassification.register(TransformerXLConfig, TransformerXLForTokenClassification)
# The second name is the one in tokenizer_config.json files of transformers 4.
AutoTokenizer.register(TransformerXLConfig, TransformerXLTokenizer, slow_tokenizer_class=TransfoXLTokenizer)
# The Trainer asks this table of names whether labels are shifted in the model, for label smoothing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TransformerXLConfig.model_type] = TransformerXLForCausalLM.__name__

__all__ = [
    "TransformerXLCache",
    "TransformerXLCausalLMOutput",
    "TransformerXLConfig",
    "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification",
    "TransformerXLForTokenClassification",
    "TransformerXLModel",
    "TransformerXLPreTrainedModel",
    "TransformerXLTokenizer",
]
