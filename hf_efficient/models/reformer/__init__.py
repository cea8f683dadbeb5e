"""Reformer: hashed attention and reversible layers. Importing this registers it with the Auto classes as `reformer`.

transformers has a model of that type too. Ours takes its place in every Auto class, unless the environment variable
`HF_EFFICIENT_KEEP_UPSTREAM_REFORMER` is 1; the classes here work by their own names either way.
"""

import os

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
    AutoTokenizer,
)

from .cache_reformer import ReformerCache
from .configuration_reformer import ReformerConfig
from .encoder_decoder_reformer import ReformerEncoderDecoderModel, ReformerForConditionalGeneration
from .heads_reformer import (
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from .language_models_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerLMOutput,
    ReformerModelWithLMHead,
)
from .modeling_reformer import ReformerModel, ReformerModelOutput, ReformerPreTrainedModel
from .tokenization_reformer import ReformerTokenizer

MODELS = {
    AutoModel: ReformerModel,
    AutoModelForCausalLM: ReformerForCausalLM,
    AutoModelForMaskedLM: ReformerForMaskedLM,
    AutoModelForPreTraining: ReformerForCausalLM,
    AutoModelForQuestionAnswering: ReformerForQuestionAnswering,
    AutoModelForSeq2SeqLM: ReformerForConditionalGeneration,
    AutoModelForSequenceClassification: ReformerForSequenceClassification,
    AutoModelForTextEncoding: ReformerModel,
    AutoModelForTokenClassification: ReformerForTokenClassification,
}

if os.environ.get("HF_EFFICIENT_KEEP_UPSTREAM_REFORMER") != "1":
    AutoConfig.register(ReformerConfig.model_type, ReformerConfig, exist_ok=True)
    for auto_class, model_class in MODELS.items():
        auto_class.register(ReformerConfig, model_class, exist_ok=True)
    AutoTokenizer.register(ReformerConfig, tokenizer_class=ReformerTokenizer, exist_ok=True)

__all__ = [
    "ReformerCache",
    "ReformerConfig",
    "ReformerEncoderDecoderModel",
    "ReformerForCausalLM",
    "ReformerForConditionalGeneration",
    "ReformerForMaskedLM",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerForTokenClassification",
    "ReformerLMOutput",
    "ReformerModel",
    "ReformerModelOutput",
    "ReformerModelWithLMHead",
    "ReformerPreTrainedModel",
    "ReformerTokenizer",
]
