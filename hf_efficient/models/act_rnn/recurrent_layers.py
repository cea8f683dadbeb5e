"""Recurrent layers, run whole sequences at a time by torch's fused kernels or one step at a time for pondering.

Both forms keep their weights in torch's own module, so that a checkpoint without ACT differs from one with it only by
the flag unit's column and the halting unit.

Letters in shape notes: B batch, L tokens, I input_size, D hidden_size, G gates (RNN 1, GRU 3, LSTM 4), S width of the
state: D, and 2 D for an LSTM, whose output and memory cell stand side by side.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

RECURRENT_MODULES = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentLayer(nn.Module):
    """One layer of RNN, LSTM or GRU."""

    def __init__(self, cell: str, input_size: int, hidden_size: int):
        super().__init__()
        self.cell = cell
        self.hidden_size = hidden_size
        self.recurrence = RECURRENT_MODULES[cell](input_size, hidden_size, batch_first=True)

    def forward(self, inputs: Tensor, state: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read a sequence: inputs (B, L, I), state (B, S) to outputs (B, L, D), state (B, S).

        lengths: (B,) tokens of each row, which stand first; outputs behind them are 0, and the state is the one after
        the row's last token. None means L for all. In an exported program, which cannot pack rows, the state is the
        one after the pads.
        """
        initial = tuple(part.contiguous() for part in state[None].split(self.hidden_size, dim=-1))
        if lengths is None or torch.compiler.is_exporting():
            outputs, final = self.recurrence(inputs, self._torch_state(initial))
            return outputs if lengths is None else _without_pads(outputs, lengths), self._joined(final)
        # Packing knows no empty rows: they read one pad, and what comes of it is thrown away.
        packed = pack_padded_sequence(inputs, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        outputs, final = self.recurrence(packed, self._torch_state(initial))
        outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=inputs.shape[1])
        has_tokens = (lengths > 0)[:, None]
        return outputs * has_tokens[..., None], torch.where(has_tokens, self._joined(final), state)

    def _torch_state(self, parts: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return parts if self.cell == "lstm" else parts[0]

    def _joined(self, final: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(final, dim=-1)[0] if self.cell == "lstm" else final[0]

    def project(self, inputs: Tensor) -> Tensor:
        """(..., I) to the inputs' part of the gates, (..., G D)."""
        return linear(inputs, self.recurrence.weight_ih_l0, self.recurrence.bias_ih_l0)

    def project_flagged(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The same for inputs (..., I - 1) whose last unit, the flag, is 0; and what the flag adds, (G D,)."""
        weight = self.recurrence.weight_ih_l0
        return linear(inputs, weight[:, :-1], self.recurrence.bias_ih_l0), weight[:, -1]

    def step(self, projected: Tensor, state: Tensor) -> Tensor:
        """One step from the inputs' part of the gates, (B, G D), and the state, (B, S), to the new state."""
        hidden = state[:, : self.hidden_size]
        recurrent = linear(hidden, self.recurrence.weight_hh_l0, self.recurrence.bias_hh_l0)
        if self.cell == "rnn":
            return torch.tanh(projected + recurrent)
        if self.cell == "gru":
            return _gru_step(projected, recurrent, hidden)
        return _lstm_step(projected + recurrent, state[:, self.hidden_size :])


def _without_pads(outputs: Tensor, lengths: Tensor) -> Tensor:
    """(B, L, D), 0 behind the first tokens of each row, (B,) many."""
    positions = torch.arange(outputs.shape[1], device=outputs.device)
    return outputs * (positions < lengths[:, None])[..., None]


def _gru_step(projected: Tensor, recurrent: Tensor, hidden: Tensor) -> Tensor:
    """Cho et al. 2014 as torch has it: the reset gate acts on the projected state."""
    size = hidden.shape[-1]
    reset, update = torch.sigmoid(projected[:, : 2 * size] + recurrent[:, : 2 * size]).chunk(2, dim=-1)
    candidate = torch.tanh(projected[:, 2 * size :] + reset * recurrent[:, 2 * size :])
    return torch.lerp(candidate, hidden, update)


def _lstm_step(gates: Tensor, memory: Tensor) -> Tensor:
    """Output and memory cell side by side, (B, 2 D), from the summed gates (B, 4 D) and the old memory cell (B, D)."""
    enter, forget, candidate, leave = gates.chunk(4, dim=-1)
    memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.cat([torch.sigmoid(leave) * torch.tanh(memory), memory], dim=-1)


__all__ = ["RECURRENT_MODULES", "RecurrentLayer"]
