"""Reformer position embeddings: axial (Kitaev et al. 2020, arXiv 2001.04451, section 5), or one learned vector each.

Letters in shape notes: B batch, T tokens, D hidden_size, N_i length of axis i, D_i features of axis i.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_reformer import ReformerConfig


class AxialTables(nn.Module):
    """One table for each axis, `weights.0`, `weights.1`, ... in files.

    A module that is called, and no `nn.ParameterList`: what brings offloaded parameters back waits for a call.
    """

    def __init__(self, shape: tuple[int, ...], num_features: tuple[int, ...]):
        super().__init__()
        self.num_axes = len(num_features)
        for axis, width in enumerate(num_features):
            extents = [1] * len(shape)
            extents[axis] = shape[axis]
            self.register_parameter(str(axis), nn.Parameter(torch.ones(*extents, width)))

    def forward(self, coordinates: list[Tensor]) -> Tensor:
        """One coordinate (B or 1, T) for each axis to (B or 1, T, D)."""
        # By name: in a replica of nn.DataParallel they are no parameters.
        tables = [getattr(self, str(axis)) for axis in range(self.num_axes)]
        rows = zip(coordinates, tables, strict=True)
        return torch.cat([F.embedding(coordinate, table.flatten(0, -2)) for coordinate, table in rows], dim=-1)


class AxialPositionEmbeddings(nn.Module):
    """Positions as coordinates: position t of axes (N_1, N_2) is `[weights.0[t // N_2], weights.1[t % N_2]]`.

    N_1 N_2 positions cost N_1 D_1 + N_2 D_2 parameters. Any number of axes, the last one runs fastest. Only the
    coordinates that occur are looked up, so a sequence of any length up to the product of the axes works.
    """

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.shape = tuple(config.axial_pos_shape)
        self.dropout = config.hidden_dropout_prob
        self.weights = AxialTables(self.shape, tuple(config.axial_pos_embds_dim))

    @property
    def max_length(self) -> int:
        """Positions that have an embedding."""
        return math.prod(self.shape)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Embeddings (B or 1, T, D) of the positions (B or 1, T).

        In training a dropped feature is dropped at all positions of a row of `position_ids`, and drawn anew for each
        row (the form of the original release): give (B, T) then. Cost O(B T D).
        """
        embeddings = self.weights(self._coordinates(position_ids))
        if not self.training or self.dropout == 0:
            return embeddings
        return embeddings * F.dropout(torch.ones_like(embeddings[:, :1]), self.dropout)

    def _coordinates(self, position_ids: Tensor) -> list[Tensor]:
        """The place of each position on every axis."""
        coordinates = []
        rest = position_ids
        for length in reversed(self.shape[1:]):
            coordinates.append(rest % length)
            rest = rest // length
        return [rest, *reversed(coordinates)]


class LearnedPositionEmbeddings(nn.Module):
    """One learned vector for each of the `max_position_embeddings` positions."""

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    @property
    def max_length(self) -> int:
        """Positions that have an embedding."""
        return self.embedding.num_embeddings

    def forward(self, position_ids: Tensor) -> Tensor:
        """Embeddings (B or 1, T, D) of the positions (B or 1, T)."""
        return self.dropout(self.embedding(position_ids))


__all__ = ["AxialPositionEmbeddings", "AxialTables", "LearnedPositionEmbeddings"]
