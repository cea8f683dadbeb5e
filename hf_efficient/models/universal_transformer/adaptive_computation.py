"""Adaptive computation time (Graves 2016, arXiv 1603.08983; Dehghani et al. 2018, arXiv 1807.03819, section 2.2).

A position takes steps until its halting probabilities add up to more than a threshold. Step n of N weighs p(n), the
last one what is missing to 1, the remainder R. The price of thinking is N + R, which the ponder loss averages.

Everything here is elementwise over positions of any leading shape, written (...): (batch, length) in a stack, (rows,)
where only some positions are left, (batch,) where a sequence halts as a whole. N is a constant to the gradient, and so
is every comparison: dR/dp(n) is -1 for n < N and 0 for n = N. The arithmetic is in float32, for float64 in float64: a
threshold of .99 is .988 in bfloat16. The truth is in `adaptive_computation_reference.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ACT_OUTPUTS = ("weighted_sum", "interpolation")
HALTED_STATES = ("copy", "evolving")


class HaltingState(NamedTuple):
    """How far each position (...) has come.

    cumulative: probability spent so far, 1 once halted.
    remainders: R, 0 before the end and where no end was forced.
    ponder_times: N so far, in floating point, without gradient.
    live: True where the position takes the next step too.
    """

    cumulative: Tensor
    remainders: Tensor
    ponder_times: Tensor
    live: Tensor


def check_halting(num_steps: int, threshold: float, min_steps: int) -> None:
    """Refuse settings under which halting means nothing.

    Raises:
        ValueError: the threshold is outside (0, 1), or `min_steps` outside 1 ... `num_steps`.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"The halting threshold must lie between 0 and 1, but is {threshold}; the paper's is 0.99.")
    if not 1 <= min_steps <= num_steps:
        raise ValueError(f"min_steps={min_steps} must be at least 1 and at most the number of steps, {num_steps}.")


def initial_halting_state(live: Tensor, dtype: torch.dtype = torch.float32) -> HaltingState:
    """State before the first step.

    Args:
        live: (...) bool, False for positions that take no step at all, such as pads.
        dtype: of the probabilities; anything below float32 is raised to it.
    """
    zeros = torch.zeros(live.shape, dtype=torch.promote_types(dtype, torch.float32), device=live.device)
    return HaltingState(cumulative=zeros, remainders=zeros, ponder_times=zeros, live=live)


def halting_step(
    state: HaltingState,
    probabilities: Tensor,
    *,
    step: int,
    num_steps: int,
    threshold: float,
    min_steps: int = 1,
    force_final_halt: bool = True,
) -> tuple[HaltingState, Tensor]:
    """Book one step: who takes it, who halts with it, and what its state weighs in the output.

    A live position halts when its probabilities pass the threshold (tensor2tensor's `>`). Where they pass before
    `min_steps`, the position waits: this step weighs nothing and spends nothing. Positions that take longer anyway
    are as without a minimum.

    Args:
        state: before the step.
        probabilities: (...) of halting in this step, in [0, 1]; finite; those of halted positions do not matter.
        step: its number from 0; `num_steps`: how many there are at most.
        force_final_halt: the last step weighs the whole remainder, so that weights add up to 1 (Graves, eq. 13).
            Without it (tensor2tensor) a position that never passes the threshold has R = 0 and weights below 1.

    Returns:
        The state after the step, whose `live` no longer has the positions that halt with it (this step is still
        computed for them), and the weights (...), 0 for those that had halted before.
    """
    cumulative, remainders, ponder_times, live = state
    probabilities = probabilities.to(cumulative.dtype)
    passes = cumulative + probabilities > threshold
    spends = live & ~passes
    halts = live & passes if step + 1 >= min_steps else torch.zeros_like(live)
    if force_final_halt and step == num_steps - 1:
        spends, halts = torch.zeros_like(live), live
    # Products, not `where` or indices: the halting unit is part of the graph even if all halt in the first step, as
    # data-parallel training without a search for unused parameters wants it.
    spent = probabilities * spends
    cumulative = cumulative + spent
    remainder = (1 - cumulative) * halts
    after = HaltingState(
        cumulative=cumulative + remainder,
        remainders=remainders + remainder,
        ponder_times=ponder_times + live.to(ponder_times.dtype),
        live=live & ~halts,
    )
    return after, spent + remainder


def accumulate_output(output: Tensor, hidden_states: Tensor, weights: Tensor, act_output: str) -> Tensor:
    """Add a step's states to the output so far.

    Args:
        output: (..., D), zeros before the first step; its dtype stays.
        hidden_states: (..., D) after the step; weights: (...).
        act_output: `"weighted_sum"` (Graves, eq. 8) adds w s; `"interpolation"` (tensor2tensor) is w s + (1 - w) y, in
            which an early state loses weight again: .4, .4 and .2 come to .192, .32 and .2.

    Returns:
        (..., D); positions of weight 0 keep their output.

    Raises:
        ValueError: there is not one weight for each state.
    """
    if weights.shape != hidden_states.shape[:-1]:
        raise ValueError(f"weights {tuple(weights.shape)} are not one for each of {tuple(hidden_states.shape[:-1])}.")
    weights = weights[..., None].to(output.dtype)
    if act_output == "interpolation":
        return torch.lerp(output, hidden_states.to(output.dtype), weights)
    return torch.addcmul(output, weights, hidden_states.to(output.dtype))


def ponder_loss(state: HaltingState, mask: Tensor | None = None) -> Tensor:
    """Mean of N + R (Graves 2016, arXiv 1603.08983, section 2.2), a scalar.

    Args:
        state: after the last step.
        mask: (...) bool, True for positions that count; None means all. Without any the loss is 0.
    """
    ponder = state.ponder_times + state.remainders
    if mask is None:
        return ponder.sum() / max(ponder.numel(), 1)
    return (ponder * mask).sum() / mask.sum().clamp(min=1)


def adaptive_computation(
    step_function: Callable[[Tensor, int], Tensor],
    halting_function: Callable[[Tensor, int], Tensor],
    hidden_states: Tensor,
    *,
    num_steps: int,
    threshold: float = 0.99,
    min_steps: int = 1,
    force_final_halt: bool = True,
    act_output: str = "weighted_sum",
    halted_states: str = "copy",
    mask: Tensor | None = None,
) -> tuple[Tensor, HaltingState]:
    """Apply a step again and again, each position as often as it likes (Graves 2016, arXiv 1603.08983).

    Every step is computed for all positions, and the loop ends when none is live; a stack that computes the live ones
    only is in `recurrence_universal_transformer.py`.

    Args:
        step_function: maps the states (..., D) and the step's number from 0 to the next states.
        halting_function: maps the same to probabilities (...) of halting with this step.
        hidden_states: (..., D) before the first step.
        num_steps: at most; further settings as in `halting_step` and `accumulate_output`.
        halted_states: what the step sees of halted positions: the state they halted with (`"copy"`, the paper's
            prose), or one that goes on to change (`"evolving"`, tensor2tensor).
        mask: (...) bool, True for positions that take part; the others keep their state, and their output is 0.

    Returns:
        The output (..., D) and the halting state, for `ponder_loss`.

    Raises:
        ValueError: an impossible setting; see `check_halting`.
    """
    check_halting(num_steps, threshold, min_steps)
    for name, value, known in (
        ("act_output", act_output, ACT_OUTPUTS),
        ("halted_states", halted_states, HALTED_STATES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    live = (
        torch.ones(hidden_states.shape[:-1], dtype=torch.bool, device=hidden_states.device) if mask is None else mask
    )
    state = initial_halting_state(live, hidden_states.dtype)
    output = torch.zeros_like(hidden_states, dtype=state.cumulative.dtype)
    for step in range(num_steps):
        probabilities = halting_function(hidden_states, step)
        after, weights = halting_step(
            state,
            probabilities,
            step=step,
            num_steps=num_steps,
            threshold=threshold,
            min_steps=min_steps,
            force_final_halt=force_final_halt,
        )
        stepped = step_function(hidden_states, step)
        output = accumulate_output(output, stepped, weights, act_output)
        moves = live if halted_states == "evolving" else state.live
        hidden_states = torch.where(moves[..., None], stepped, hidden_states)
        state = after
        if not state.live.any():
            break
    return output.to(hidden_states.dtype), state


__all__ = [
    "HaltingState",
    "accumulate_output",
    "adaptive_computation",
    "check_halting",
    "halting_step",
    "initial_halting_state",
    "ponder_loss",
]
