"""What the Evolved Transformer's language models return: transformers' outputs, and the loss of every token.

Letters in shape notes: B batch, L tokens.

In all outputs `hidden_states` has the embeddings and one entry per block, the last of them final. A decoder's
`attentions` and `cross_attentions` have two entries per block: of the wide attention and the one beside it, then of
the other two.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput


@dataclass
class EvolvedTransformerCausalLMOutput(CausalLMOutputWithPast):
    """Output of `EvolvedTransformerForCausalLM`.

    Args:
        losses: per token, 0 where ignored: (B, L), but (B, L - 1) where labels were shifted in the model.
    """

    losses: torch.FloatTensor | None = None


@dataclass
class EvolvedTransformerSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Output of `EvolvedTransformerForConditionalGeneration`.

    Args:
        losses: (B, L), per target token, 0 where ignored.
    """

    losses: torch.FloatTensor | None = None


__all__ = ["EvolvedTransformerCausalLMOutput", "EvolvedTransformerSeq2SeqLMOutput"]
