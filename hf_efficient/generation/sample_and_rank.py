"""Sample-and-rank: draw several answers at a temperature, give the one that the model itself finds likeliest.

Adiwardana et al. 2020 (arXiv 2001.09977), "sample-and-rank": N = 20 independent samples at temperature 0.88,
ranked by log P / T, the log-probability per token. Beam search finds likelier texts, and duller ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

DEFAULT_NUM_SAMPLES = 20
DEFAULT_TEMPERATURE = 0.88

# Arguments of `generate` that are settled here; the values say what to write instead.
SETTLED = {
    "do_sample": "samples are always drawn; for the likeliest text call model.generate",
    "generation_config": "give its settings as keywords",
    "max_length": "give max_new_tokens, which leaves the prompt out",
    "num_beams": "samples are drawn one by one; for beams call model.generate",
    "num_return_sequences": "its name here is num_samples",
    "output_logits": "the scores are in the output already",
    "return_dict_in_generate": "the output is always an object",
    "stop_strings": "texts end with a token; give eos_token_id",
    "stopping_criteria": "texts end with a token; give eos_token_id",
    "streamer": "the best sample is known only when all are written; print the result",
}


@dataclass
class SampleAndRankOutput(ModelOutput):
    """The samples of each row, best first.

    Letters: B rows, N samples, L tokens as `generate` returns them (with the prompt, or the decoder's start token).

    sequences: (B, L) ids, the best of each row. scores: (B,) their scores, the mean log-probability in nats of the
    answer's tokens, -inf for an answer without tokens. candidates: (B, N, L) all of them. candidate_scores: (B, N),
    falling. candidate_lengths: (B, N), the tokens that were counted.
    """

    sequences: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    candidates: torch.LongTensor | None = None
    candidate_scores: torch.FloatTensor | None = None
    candidate_lengths: torch.LongTensor | None = None


@torch.no_grad()
def sample_and_rank(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_samples: int = DEFAULT_NUM_SAMPLES,
    temperature: float = DEFAULT_TEMPERATURE,
    max_new_tokens: int = 64,
    samples_per_pass: int | None = None,
    **generate_settings: Any,
) -> SampleAndRankOutput:
    """Draw `num_samples` texts for each row and rank them by their mean log-probability per token.

    Meena's way to decode: Adiwardana et al. 2020, arXiv 2001.09977. The temperature, and `top_k` and `top_p` where
    given, shape what is drawn; what is ranked is the probability of the model itself, without them. The
    end-of-sequence token and what comes after it do not count, so that a text that ran out of room is not favoured for
    having no end. Samples come from torch's global generator: seed it to repeat a call (`transformers.set_seed`). Rows
    of a batch share its numbers, so they draw other samples than each alone.

    Args:
        model: any model with `generate`, causal or with an encoder, in evaluation mode.
        input_ids: (B, T) prompts, or the encoder's inputs. attention_mask: (B, T), 1 for tokens, 0 for pads; causal
            models want pads on the left.
        max_new_tokens: most tokens of a text, its end among them.
        samples_per_pass: samples of each row that are drawn at once; None draws all. What is held is
            B * samples_per_pass * max_new_tokens * vocab_size numbers, and as many caches.
        generate_settings: further arguments of `model.generate`, such as `top_k`, `min_new_tokens` or `num_steps`.

    Costs N decodings of a row and no further pass: the scores come from the logits that were sampled from.

    Raises ValueError for a model in training mode, numbers below 1, a temperature that is not positive, or a setting
    of `generate` that is settled here.
    """
    per_pass = num_samples if samples_per_pass is None else samples_per_pass
    _check(model, input_ids, generate_settings, temperature, num_samples=num_samples, samples_per_pass=per_pass)
    settings = {"attention_mask": attention_mask, "max_new_tokens": max_new_tokens, "temperature": temperature}
    settings |= {"top_k": 0, "top_p": 1.0} | generate_settings
    passes = []
    for start in range(0, num_samples, per_pass):
        number = min(per_pass, num_samples - start)
        passes.append(_draw(model, input_ids, number, settings))
    return _rank(*_join(passes, _pad_token_id(model, settings)))


def _check(
    model: PreTrainedModel, input_ids: Tensor, settings: dict[str, Any], temperature: float, **numbers: int
) -> None:
    """Raises ValueError for what `sample_and_rank` refuses."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive; for the likeliest text call model.generate.")
    for name in settings:
        if name in SETTLED:
            raise ValueError(f"{name}={settings[name]!r} cannot be set: {SETTLED[name]}.")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has the shape {tuple(input_ids.shape)}; give (batch, length).")
    if model.training:
        raise ValueError("model is in training mode, where dropout falsifies the scores; call model.eval() first.")


def _draw(
    model: PreTrainedModel, input_ids: Tensor, number: int, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """`number` samples for each row: ids (B, number, L), scores (B, number) and counted tokens (B, number)."""
    output = model.generate(
        input_ids,
        do_sample=True,
        max_length=None,  # a model may have been saved with one
        num_beams=1,
        num_return_sequences=number,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    answers = output.sequences[:, -len(output.logits) :]
    counted = _is_counted(answers, _eos_token_ids(model, settings))
    total = torch.zeros(len(answers), device=answers.device)
    for step, logits in enumerate(output.logits):  # one after the other: together they are copied whole
        chosen = logits.float().log_softmax(-1).gather(-1, answers[:, step, None].to(logits.device))[:, 0]
        total += torch.where(counted[:, step], chosen.to(total), 0)
    lengths = counted.sum(dim=1)
    scores = torch.where(lengths > 0, total / lengths.clamp(min=1), -torch.inf)
    shape = (input_ids.shape[0], number)
    return output.sequences.view(*shape, -1), scores.view(shape), lengths.view(shape)


def _is_counted(answers: Tensor, eos_token_ids: list[int]) -> Tensor:
    """(rows, steps), true before the first end of sequence."""
    return torch.isin(answers, answers.new_tensor(eos_token_ids)).cumsum(dim=1) == 0


def _eos_token_ids(model: PreTrainedModel, settings: dict[str, Any]) -> list[int]:
    """The ids that end a text, as `generate` finds them."""
    eos = settings.get("eos_token_id", model.generation_config.eos_token_id)
    if eos is None:
        return []
    return list(eos) if isinstance(eos, Iterable) else [int(eos)]


def _pad_token_id(model: PreTrainedModel, settings: dict[str, Any]) -> int | None:
    """What `generate` writes behind a text that has ended: without a pad token, the end again."""
    pad = settings.get("pad_token_id", model.generation_config.pad_token_id)
    return pad if pad is not None else next(iter(_eos_token_ids(model, settings)), None)


def _join(passes: list[tuple[Tensor, Tensor, Tensor]], pad_token_id: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of several passes side by side, shorter ones padded. Without an end, all are equally long."""
    longest = max(sequences.shape[-1] for sequences, _, _ in passes)
    padded = [
        torch.nn.functional.pad(sequences, (0, longest - sequences.shape[-1]), value=pad_token_id or 0)
        for sequences, _, _ in passes
    ]
    scores, lengths = (torch.cat([one[i] for one in passes], dim=1) for i in (1, 2))
    return torch.cat(padded, dim=1), scores, lengths


def _rank(candidates: Tensor, scores: Tensor, lengths: Tensor) -> SampleAndRankOutput:
    """The samples of each row in falling order of their scores; of equal ones, the one drawn first."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    candidates = candidates.gather(1, order[..., None].expand_as(candidates))
    return SampleAndRankOutput(candidates[:, 0], scores[:, 0], candidates, scores, lengths.gather(1, order))
