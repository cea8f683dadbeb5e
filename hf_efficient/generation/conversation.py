"""A talk with a model: the turns so far become its input as in training, its answer becomes the next turn."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import DEFAULT_MAX_TURNS, encode_sources, join_history
from .sample_and_rank import sample_and_rank


class Conversation:
    """A talk with a model that was trained on conversations (`hf-efficient train --task conversation`).

    Example:

        talk = Conversation(model, tokenizer)
        print(talk.reply("Do you like music?"))
        print(talk.reply("Which?"))  # it sees all three turns
        talk.reset()

    model: with an encoder, which reads the turns so far, or causal, which continues them. It is in evaluation mode.
    max_turns: turns that the model sees at most. max_length: their tokens at most; the oldest turns are left out as
    wholes. None takes the tokenizer's `model_max_length`, where training writes what the model has seen.
    sampling: arguments of `sample_and_rank`, which see, such as `num_samples`, `temperature` and `max_new_tokens`.

    turns: all that was said, the user's and the model's in turn. score: of the last answer, its mean log-probability
    per token; None before the first.

    Raises ValueError for fewer than one turn or token, and for a tokenizer without an eos token, which ends a turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_turns: int = DEFAULT_MAX_TURNS,
        max_length: int | None = None,
        **sampling: Any,
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer has no eos token, which ends every turn; set tokenizer.eos_token.")
        max_length = tokenizer.model_max_length if max_length is None else max_length
        for name, number in (("max_turns", max_turns), ("max_length", max_length)):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1.")
        self.model = model
        self.tokenizer = tokenizer
        self.max_turns = max_turns
        self.max_length = max_length
        self.sampling = sampling
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.turns: list[str] = []
        self.score: float | None = None

    def reply(self, text: str) -> str:
        """The model's answer to `text`, which is kept as a turn, as the answer is.

        Costs `num_samples` decodings. Raises ValueError if the text is blank or longer than `max_length` tokens; what
        was said before is then unchanged, as it is when the call is interrupted.
        """
        text = text.strip()
        if not text:
            raise ValueError("text is blank; say something.")
        input_ids = self.input_ids([*self.turns, text])
        output = sample_and_rank(self.model, input_ids, torch.ones_like(input_ids), **self.sampling)
        assert output.sequences is not None
        assert output.scores is not None
        answer = self._decode(output.sequences[0], input_ids.shape[1])
        self.turns += [text, answer]
        self.score = output.scores.item()
        return answer

    def input_ids(self, turns: list[str]) -> torch.Tensor:
        """(1, T): what the model reads of `turns` before it answers the last of them."""
        eos = self.tokenizer.eos_token_id
        encoded = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in encode_sources(turns, self.tokenizer)]
        return torch.tensor([join_history(encoded, self.max_turns, self.max_length)], device=self.model.device)

    def _decode(self, sequence: torch.Tensor, prompt_length: int) -> str:
        """The text of an answer; a causal model's sequence begins with the prompt."""
        answer = sequence if self.model.config.is_encoder_decoder else sequence[prompt_length:]
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()
