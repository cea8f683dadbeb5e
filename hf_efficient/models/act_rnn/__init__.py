"""Recurrent networks with and without Adaptive Computation Time, registered with the Auto classes as `act_rnn`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_act_rnn import ActRnnCache
from .configuration_act_rnn import ActRnnConfig
from .heads_act_rnn import (
    ActRnnForCausalLM,
    ActRnnForSequenceClassification,
    ActRnnForTokenClassification,
    ActRnnHeadOutput,
)
from .modeling_act_rnn import ActRnnModel, ActRnnModelOutput, ActRnnPreTrainedModel

AutoConfig.register(ActRnnConfig.model_type, ActRnnConfig)
AutoModel.register(ActRnnConfig, ActRnnModel)
AutoModelForCausalLM.register(ActRnnConfig, ActRnnForCausalLM)
AutoModelForSequenceClassification.register(ActRnnConfig, ActRnnForSequenceClassification)
AutoModelForTokenClassification.register(ActRnnConfig, ActRnnForTokenClassification)

__all__ = [
    "ActRnnCache",
    "ActRnnConfig",
    "ActRnnForCausalLM",
    "ActRnnForSequenceClassification",
    "ActRnnForTokenClassification",
    "ActRnnHeadOutput",
    "ActRnnModel",
    "ActRnnModelOutput",
    "ActRnnPreTrainedModel",
]
