"""Sides of the Evolved Transformer's decoding: whole translations by `generate`, ours and transformers' Marian."""

from typing import Any

import torch
from inputs import token_ids
from transformers import GenerationConfig, MarianConfig, MarianMTModel, PreTrainedModel

from hf_efficient import EvolvedTransformerConfig, EvolvedTransformerForConditionalGeneration


class Translation:
    """Sentences translated by `generate`; the unit is a token of every row.

    Args:
        model: the configuration in the words of the side's library.
        length: tokens of each translation, none of which ends earlier.
        source_length: tokens of each sentence.
        num_rows: sentences.
        num_beams: beams of each.
        use_cache: otherwise every token is a pass over all that were chosen before.
    """

    def __init__(
        self,
        model: dict[str, Any],
        length: int,
        source_length: int = 32,
        num_rows: int = 1,
        num_beams: int = 1,
        use_cache: bool = True,
    ):
        torch.manual_seed(0)
        self.model = self.build(model).eval()
        self.units = length
        self.source = token_ids(num_rows, source_length, model["vocab_size"])
        self.settings = GenerationConfig(
            max_new_tokens=length,
            num_beams=num_beams,
            use_cache=use_cache,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            decoder_start_token_id=0,
        )

    def build(self, model: dict[str, Any]) -> PreTrainedModel:
        """A new model."""
        raise NotImplementedError

    def generate(self, **arguments: Any) -> Any:
        """What `generate` returns."""
        return self.model.generate(
            self.source, attention_mask=torch.ones_like(self.source), generation_config=self.settings, **arguments
        )

    def run(self) -> None:
        """All translations."""
        length = self.generate().shape[1] - 1
        if length != self.units:
            raise RuntimeError(f"The translations have {length} tokens, not {self.units}.")

    def count_parameters(self) -> int:
        """All of them."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @torch.no_grad()
    def logit_difference(self) -> float:
        """Largest difference between the logits while greedily decoding and those of one pass over what was chosen."""
        output = self.generate(return_dict_in_generate=True, output_logits=True, num_beams=1)
        whole = self.model(self.source, decoder_input_ids=output.sequences[:, :-1], use_cache=False).logits
        return (torch.stack(output.logits, dim=1) - whole).abs().max().item()


class Evolved(Translation):
    """Ours."""

    def build(self, model: dict[str, Any]) -> PreTrainedModel:
        """A new model."""
        return EvolvedTransformerForConditionalGeneration(EvolvedTransformerConfig(**model))


class Marian(Translation):
    """transformers' encoder-decoder Transformer for translation, with SDPA."""

    def build(self, model: dict[str, Any]) -> PreTrainedModel:
        """A new model; what its configuration says about the last token would end translations."""
        network = MarianMTModel(MarianConfig(**model))
        network.generation_config = GenerationConfig()
        return network
