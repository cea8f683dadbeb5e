"""Sides without recurrence: transformers' own models of the same depth and width over a sliding window."""

import torch
from inputs import token_ids
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM


class RecomputeWindow:
    """For every predicted token the whole window anew, of which the last position counts; the unit is a token.

    The model is GPT-2 with fused attention: learned absolute positions, as in the baseline of the paper's Table 9, and
    the cheapest layer of its size (two matrices in the feed-forward network, no position work in attention).
    """

    def __init__(self, vocab_size: int, width: int, num_heads: int, inner: int, num_layers: int, window: int):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=window,
            n_embd=width,
            n_head=num_heads,
            n_inner=inner,
            n_layer=num_layers,
            activation_function="relu",
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
        self.model = GPT2LMHeadModel(config).eval()
        self.vocab_size, self.window, self.position = vocab_size, window, 0

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """Logits (1, vocab_size) behind the window that ends at the next token."""
        ids = token_ids(1, self.window, self.vocab_size, self.position)
        self.position += 1
        return self.model(ids, logits_to_keep=1).logits[:, -1]

    def count_parameters(self) -> int:
        """Parameters without the tables of tokens and positions."""
        return sum(parameter.numel() for parameter in self.model.transformer.h.parameters())

    @torch.no_grad()
    def check(self, length: int) -> float:
        """Largest difference between the last position's logits and those of a pass that keeps all of them."""
        ids = token_ids(1, length, self.vocab_size)
        return (self.model(ids).logits[:, -1] - self.model(ids, logits_to_keep=1).logits[:, -1]).abs().max().item()


class CachedWindow:
    """Segment after segment with keys and values of a sliding window kept; the unit is a token.

    The model is Mistral: what one would use today for a bounded attention length. Its feed-forward network has three
    matrices, so `inner` is taken times 2/3.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        num_heads: int,
        inner: int,
        num_layers: int,
        window: int,
        segment_len: int,
    ):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            intermediate_size=inner * 2 // 3,
            num_hidden_layers=num_layers,
            sliding_window=window,
            attn_implementation="sdpa",
        )
        self.model = MistralForCausalLM(config).eval()
        self.memory, self.units = DynamicCache(config=config), segment_len
        self.vocab_size, self.position = vocab_size, 0
        while self.position < window:
            self.run()

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """One segment; the losses of its tokens, (segment_len,)."""
        ids = token_ids(1, self.units + 1, self.vocab_size, self.position)
        self.position += self.units
        logits = self.model(ids[:, :-1], past_key_values=self.memory).logits
        return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")

    def count_parameters(self) -> int:
        """Parameters without the table of tokens and the softmax."""
        return sum(parameter.numel() for parameter in self.model.model.layers.parameters())
