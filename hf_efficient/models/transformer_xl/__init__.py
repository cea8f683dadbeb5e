"""Transformer-XL: recurrence in length. Importing this registers it with the Auto classes as `transfo-xl`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from .cache_transformer_xl import TransformerXLCache
from .configuration_transformer_xl import TransformerXLConfig
from .heads_transformer_xl import TransformerXLForSequenceClassification, TransformerXLForTokenClassification
from .language_models_transformer_xl import TransformerXLCausalLMOutput, TransformerXLForCausalLM
from .modeling_transformer_xl import TransformerXLModel, TransformerXLPreTrainedModel
from .tokenization_transformer_xl import TransformerXLTokenizer, TransfoXLTokenizer

AutoConfig.register(TransformerXLConfig.model_type, TransformerXLConfig)
AutoModel.register(TransformerXLConfig, TransformerXLModel)
AutoModelForCausalLM.register(TransformerXLConfig, TransformerXLForCausalLM)
AutoModelForSequenceClassification.register(TransformerXLConfig, TransformerXLForSequenceClassification)
AutoModelForTokenClassification.register(TransformerXLConfig, TransformerXLForTokenClassification)
# The second name is the one in tokenizer_config.json files of transformers 4.
AutoTokenizer.register(TransformerXLConfig, TransformerXLTokenizer, slow_tokenizer_class=TransfoXLTokenizer)

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
