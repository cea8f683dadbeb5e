"""The models against the token-by-token restatement: states, logits, every gradient, whole and through the cache."""

import random

import pytest
import torch
from models.evolved_transformer.naive_evolved_transformer import run_stack
from models.evolved_transformer.small_models import EXACT, SINGLE, random_ids, small_model
from models.evolved_transformer.whole_models import STACKS
from torch import Tensor

from hf_efficient import EvolvedTransformerForCausalLM, EvolvedTransformerForConditionalGeneration
from hf_efficient import EvolvedTransformerModel as Body

CASES = {
    "plain": {},
    "one_block": {"num_encoder_layers": 1, "num_decoder_layers": 1},
    "unequal_stacks": {"num_encoder_layers": 1, "num_decoder_layers": 3},
    "one_wide_head": {"num_wide_attention_heads": 1},
    "one_head": {"num_attention_heads": 1},
    "narrow": {"hidden_size": 2, "num_attention_heads": 1},
    "no_positions": {"position_signal": "none", "scale_embeddings": False},
    "zero_pads": {"zero_pad_embedding": True, "pad_token_id": 3},
    "epsilon": {"layer_norm_eps": 0.1},
}
# Unpadded, pads on both sides, a single token at the end, and at the beginning.
MASK = [[1] * 7, [0, 1, 1, 1, 1, 0, 0], [0] * 6 + [1], [1] + [0] * 6]
SOURCE_MASK = [[1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 1, 1]]
# Longer than what the encoder's branches, and the decoder's, look at.
LONG_MASK = [[1] * 25, [0] * 8 + [1] * 17]


class Comparison:
    """A body and the restatement on the same batch, with the same parameters."""

    def __init__(self, changes: dict, kind: str, mask=MASK, source_mask=SOURCE_MASK, implementation="sdpa", seed=0):
        self.model = small_model(Body, seed=seed, **(STACKS[kind] | changes))
        self.model.set_attn_implementation(implementation)
        self.kind, self.mask, self.source_mask = kind, mask, source_mask
        self.ids = random_ids(len(mask), len(mask[0]), seed=seed)
        self.source = random_ids(len(source_mask), len(source_mask[0]), seed=seed + 1)

    def run(self, **call):
        mask, source_mask = torch.tensor(self.mask), torch.tensor(self.source_mask)
        call = {"use_cache": False} | call
        if self.kind != "both":
            return self.model(self.ids, mask, **call)
        decoded = {"decoder_input_ids": self.ids, "decoder_attention_mask": mask}
        return self.model(self.source, source_mask, **decoded, **call)

    def run_in_chunks(self, sizes: list[int]) -> Tensor:
        """States (B, L, D) of a decoder that gets its tokens in chunks of these sizes, through the cache."""
        cache, states, seen = None, [], 0
        memory = None
        if self.kind == "both":
            memory = self.model.get_encoder()(self.source, torch.tensor(self.source_mask))
        for ids in self.ids.split(sizes, dim=1):
            seen += ids.shape[1]
            mask = torch.tensor(self.mask)[:, :seen]
            call = {"past_key_values": cache, "use_cache": True}
            if memory is None:
                outputs = self.model(ids, mask, **call)
            else:
                call |= {"decoder_input_ids": ids, "decoder_attention_mask": mask, "encoder_outputs": memory}
                outputs = self.model(attention_mask=torch.tensor(self.source_mask), **call)
            cache = outputs.past_key_values
            states.append(outputs.last_hidden_state)
        return torch.cat(states, dim=1)

    def naive(self) -> list[Tensor]:
        """States (B, L, D) of the last stack, before the first block and after each."""
        config, weights = self.model.config, dict(self.model.named_parameters())
        memories = None
        if self.kind == "both":
            encoded = run_stack(config, weights, "encoder", self.source.tolist(), self.source_mask)
            memories = [
                [state for state, token in zip(reports[-1], tokens, strict=True) if token]
                for reports, tokens in zip(encoded, self.source_mask, strict=True)
            ]
        stack = "encoder" if self.kind == "encoder" else "decoder"
        rows = run_stack(config, weights, stack, self.ids.tolist(), self.mask, memories)
        return [torch.stack([torch.stack(states) for states in block]) for block in zip(*rows, strict=True)]

    def tokens(self) -> Tensor:
        return torch.tensor(self.mask, dtype=torch.bool)


def assert_agreement(comparison: Comparison) -> None:
    """Of the states before and after all blocks, and of all gradients."""
    tokens = comparison.tokens()
    outputs = comparison.run(output_hidden_states=True)
    expected = comparison.naive()
    reports = outputs.decoder_hidden_states if comparison.kind == "both" else outputs.hidden_states
    assert len(reports) == len(expected)
    for report, states in zip(reports, expected, strict=True):
        torch.testing.assert_close(report[tokens], states[tokens], **EXACT)
    actual, wanted = outputs.last_hidden_state[tokens], expected[-1][tokens]
    torch.testing.assert_close(actual, wanted, **EXACT)
    assert_gradients(comparison.model, actual, wanted)


def assert_gradients(model: torch.nn.Module, actual: Tensor, expected: Tensor) -> None:
    """Gradients of a random combination of the entries."""
    cotangent = torch.randn_like(actual)
    names, parameters = zip(*model.named_parameters(), strict=True)
    sides = [
        torch.autograd.grad((side * cotangent).sum(), parameters, materialize_grads=True)
        for side in (actual, expected)
    ]
    for name, gradient, wanted in zip(names, *sides, strict=True):
        scale = float(wanted.abs().max().clamp(min=1))
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-8, atol=1e-9 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def settings_of_all_stacks() -> list:
    """Every case with both stacks; with one of them quickly only the first, as the two meet them in the other."""
    return [
        pytest.param(changes, kind, id=f"{name}-{kind}", marks=() if is_quick else pytest.mark.slow)
        for name, changes in CASES.items()
        for kind in STACKS
        for is_quick in [kind == "both" or name == "plain"]
    ]


@pytest.mark.parametrize(("changes", "kind"), settings_of_all_stacks())
def test_every_setting(changes, kind):
    assert_agreement(Comparison(changes, kind))


@pytest.mark.parametrize("kind", ["encoder", "both"])
def test_the_encoders_input_bias(kind):
    assert_agreement(Comparison({"encoder_input_bias": True}, kind))


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_long_rows(kind, implementation):
    """Every tap of every kernel sees a token, and a pad."""
    settings = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    assert_agreement(Comparison(settings, kind, LONG_MASK, [[1, 0], [1, 1]], implementation))


@pytest.mark.parametrize("kind", ["decoder", "both"])
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 1, 3], [7]], ids=["tokens", "chunks", "whole"])
@torch.no_grad()
def test_through_the_cache(kind, sizes):
    comparison = Comparison({}, kind)
    expected, tokens = comparison.naive()[-1], comparison.tokens()
    torch.testing.assert_close(comparison.run_in_chunks(sizes)[tokens], expected[tokens], **EXACT)


@pytest.mark.parametrize("kind", STACKS)
def test_single_precision(kind):
    comparison = Comparison({}, kind)
    expected, tokens = comparison.naive()[-1], comparison.tokens()
    comparison.model.float()
    torch.testing.assert_close(comparison.run().last_hidden_state[tokens], expected[tokens].float(), **SINGLE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", [EvolvedTransformerForCausalLM, EvolvedTransformerForConditionalGeneration])
def test_logits_and_losses(cls, tied):
    """The output layer reads the last states; a label's loss is the negative log of its probability."""
    kind = "decoder" if cls is EvolvedTransformerForCausalLM else "both"
    model = small_model(cls, **STACKS[kind], tie_word_embeddings=tied)
    comparison = Comparison({}, kind, [[1] * 5, [1] * 4 + [0]], [[1, 1], [1, 0]])
    comparison.model = model.model
    states = comparison.naive()[-1]
    mask = comparison.tokens()
    labels = comparison.ids.masked_fill(~mask, -100)
    comparison.model = model
    output = comparison.run(labels=labels)
    table = (model.model.embed_tokens if tied else model.lm_head).weight
    expected = states @ table.T
    torch.testing.assert_close(output.logits[mask], expected[mask], **EXACT)
    shift = 1 if kind == "decoder" else 0
    losses = [
        [expected[b, i].logsumexp(0) - expected[b, i, label] for i, label in enumerate(row[shift:]) if label >= 0]
        for b, row in enumerate(labels.tolist())
    ]
    for found, wanted in zip(output.losses, losses, strict=True):
        torch.testing.assert_close(found[: len(wanted)], torch.stack(wanted).to(found.dtype), **SINGLE)
        assert not found[len(wanted) :].any()
    flat = torch.stack([loss for row in losses for loss in row])
    torch.testing.assert_close(output.loss.double(), flat.mean(), **SINGLE)


# --- everything with everything -----------------------------------------------------------------------------


def random_changes(draw: random.Random, kind: str) -> dict:
    """A legal configuration."""
    heads = draw.choice([1, 2, 4])
    size = 2 * heads * draw.choice([1, 2, 3])
    return {
        "hidden_size": size,
        "num_attention_heads": heads,
        "num_wide_attention_heads": draw.choice([None, *[n for n in range(1, size + 1) if size % n == 0]]),
        "num_encoder_layers": draw.randint(1, 3),
        "num_decoder_layers": draw.randint(1, 3),
        "position_signal": draw.choice(["sinusoid", "none"]),
        "scale_embeddings": draw.choice([True, False]),
        "zero_pad_embedding": draw.choice([True, False]),
        "encoder_input_bias": kind != "decoder" and draw.choice([True, False]),
        "layer_norm_eps": draw.choice([1e-6, 1e-3]),
    }


def random_mask(draw: random.Random, num_rows: int) -> list[list[int]]:
    """Rows of all lengths; at least one token each, pads on either side or on both."""
    length = draw.choice([1, 2, 3, 5, 8, 13, 20])
    rows = []
    for _ in range(num_rows):
        count = draw.randint(1, length)
        before = draw.choice([0, length - count, draw.randint(0, length - count)])
        rows.append([0] * before + [1] * count + [0] * (length - count - before))
    return rows


def random_sizes(draw: random.Random, length: int) -> list[int]:
    """Sizes of chunks that together have this length."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(draw.randint(1, min(draw.choice([1, 4, length]), length - sum(sizes))))
    return sizes


def check_random_configuration(seed: int) -> None:
    draw = random.Random(seed)
    kind = draw.choice([*STACKS])
    num_rows = draw.choice([1, 2, 3])
    implementation = draw.choice(["sdpa", "eager"])
    changes = random_changes(draw, kind)
    masks = random_mask(draw, num_rows), random_mask(draw, num_rows)
    comparison = Comparison(changes, kind, *masks, implementation, seed)
    assert_agreement(comparison)
    if kind != "encoder":
        whole = comparison.run().last_hidden_state
        found = comparison.run_in_chunks(random_sizes(draw, len(masks[0][0])))
        tokens = comparison.tokens()
        torch.testing.assert_close(found[tokens], whole[tokens], **EXACT)


@pytest.mark.parametrize("seed", range(6))
def test_random_configurations(seed):
    check_random_configuration(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(6, 306, 20))
def test_hundreds_of_random_configurations(first):
    for seed in range(first, first + 20):
        try:
            check_random_configuration(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
