"""Random models, random segments with random pads, and random operations on the memory, against rows alone."""

import random

import pytest
import torch
from models.transformer_xl.naive_transformer_xl import NaiveRows
from models.transformer_xl.small_models import assert_rows_equal, random_ids, small_model


def random_settings(draw: random.Random) -> dict:
    """Settings of a legal model."""
    mem_len = draw.choice([0, 1, 2, 3, 5, 8])
    cutoffs = draw.choice([[], [], [5], [4, 11]])
    return {
        "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": draw.choice([1, 2]),
        "head_dim": draw.choice([2, 4]),
        "mem_len": mem_len,
        "same_length": mem_len > 0 and draw.random() < 0.5,
        "memory_init": draw.choice(["empty", "zeros"]),
        "clamp_len": draw.choice([-1, 1, 4]),
        "pre_norm": draw.random() < 0.5,
        "untie_r": draw.random() < 0.5,
        "cutoffs": cutoffs,
        "div_val": draw.choice([1, 2]) if cutoffs else 1,
        "embedding_size": draw.choice([4, 8]),
        "tie_word_embeddings": draw.random() < 0.5,
    }


class Walk:
    """A stream on which one random thing after the other happens."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.settings = random_settings(self.draw)
        self.model = small_model(seed=seed, **self.settings)
        self.model.set_attn_implementation(self.draw.choice(["eager", "sdpa"]))
        self.cache, self.rows = self.model.create_cache(), NaiveRows(self.model, self.draw.choice([1, 2, 3]))
        self.steps: list[str] = []

    def feed(self) -> None:
        """A segment, perhaps with pads, in the mode that the memory allows."""
        length, num_rows = self.draw.choice([1, 1, 2, 3, 7]), len(self.rows.memories)
        ids = random_ids(num_rows, length, seed=self.draw.randrange(10**6))
        mask = None
        if self.draw.random() < 0.4:
            mask = torch.tensor([[int(self.draw.random() < 0.7) for _ in range(length)] for _ in range(num_rows)])
        mode = self.draw.choice([torch.no_grad, torch.no_grad, torch.enable_grad, torch.inference_mode])
        self.model.train(not self.cache.holds_keys and self.draw.random() < 0.3)
        self.steps.append(f"feed({tuple(ids.shape)}, mask={mask if mask is None else mask.tolist()}, {mode.__name__})")
        with mode():
            output = self.model(ids, attention_mask=mask, past_key_values=self.cache)
        with torch.no_grad():
            assert_rows_equal(output, self.rows.feed(ids, mask), mask)
        assert self.cache.row_lengths.tolist() == [len(memory[0]) for memory in self.rows.memories]

    def reset(self) -> None:
        """Some rows begin anew."""
        rows = [self.draw.random() < 0.5 for _ in self.rows.memories]
        self.cache.reset_rows(torch.tensor(rows))
        self.rows.reset([row for row, is_reset in enumerate(rows) if is_reset])

    def reorder(self) -> None:
        """Rows are selected, in any order and number."""
        num_rows = len(self.rows.memories)
        order = [self.draw.randrange(num_rows) for _ in range(self.draw.choice([1, 2, 3]))]
        self.cache.batch_select_indices(torch.tensor(order))
        self.rows.select(order)

    def repeat(self) -> None:
        """Each row twice."""
        if len(self.rows.memories) <= 2:
            self.rows.select([row for row in range(len(self.rows.memories)) for _ in range(2)])
            self.cache.batch_repeat_interleave(2)

    def save(self) -> None:
        """Through a state dict into another cache."""
        other = self.model.create_cache()
        other.load_state_dict(self.cache.state_dict())
        self.cache = other

    def crop(self) -> None:
        """Feed without pads and take some back, exactly or not at all."""
        length = self.draw.choice([1, 3, 6])
        removed = self.draw.randrange(length + 1)
        ids = random_ids(len(self.rows.memories), length, seed=self.draw.randrange(10**6))
        self.model.eval()
        if self.draw.random() < 0.5:
            self.cache.activate_past_recording()
        with torch.no_grad():
            self.model(ids, past_key_values=self.cache)
            try:
                self.cache.crop(-removed)
            except ValueError:
                removed = 0
                self.steps.append("refused")
            if removed < length:
                self.rows.feed(ids[:, : length - removed])

    def run(self, num_steps: int) -> None:
        """Do `num_steps` things."""
        self.feed()
        actions = [self.feed] * 6 + [self.reset, self.reorder, self.repeat, self.save, self.crop]
        for _ in range(num_steps):
            action = self.draw.choice(actions)
            self.steps.append(action.__name__)
            action()
        self.feed()


def run_walk(seed: int, num_steps: int) -> None:
    walk = Walk(seed)
    try:
        walk.run(num_steps)
    except Exception as error:
        steps = "\n".join(walk.steps)
        raise AssertionError(f"seed {seed}, {walk.settings}:\n{steps}") from error


@pytest.mark.parametrize("seed", range(6))
def test_random_walk(seed):
    run_walk(seed, 10)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_random_walks(part):
    for seed in range(100 + 20 * part, 120 + 20 * part):
        run_walk(seed, 25)
