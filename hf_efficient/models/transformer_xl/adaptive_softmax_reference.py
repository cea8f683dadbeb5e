"""Adaptive embedding and softmax written from the equations, one token at a time: the truth for `adaptive_softmax.py`.

Grave et al. 2017, arXiv 1609.04309; Baevski & Auli 2019, arXiv 1809.10853. `cutoffs` are the first ids of the tail
bins. Everything is given per bin, a projection being None where there is none.
"""

import torch
from torch import Tensor


def bin_of(token: int, cutoffs: list[int]) -> tuple[int, int]:
    """(index of the token's bin, first id of that bin)."""
    index, start = 0, 0
    for i, cutoff in enumerate(cutoffs):
        if token >= cutoff:
            index, start = i + 1, cutoff
    return index, start


def adaptive_embedding_reference(
    token: int, tables: list[Tensor], projections: list[Tensor | None], cutoffs: list[int]
) -> Tensor:
    """Embedding of one token, (D,): its row in its bin's table, mapped to the model's width.

    Args:
        token: id.
        tables: (words of bin i, width of bin i) each.
        projections: (D, width of bin i) each, or None.
        cutoffs: first ids of the tail bins.
    """
    index, start = bin_of(token, cutoffs)
    row = tables[index][token - start]
    return row if projections[index] is None else projections[index] @ row


def adaptive_log_probs_reference(
    hidden_state: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    projections: list[Tensor | None],
    cluster_weight: Tensor | None,
    cluster_bias: Tensor | None,
) -> list[Tensor]:
    """log p(w) for every id w in order, each a scalar.

    The head is a softmax over its own words and one more column for each tail bin, the first tail's column first; a
    word of tail i has the probability of column i times its own within the tail.

    Args:
        hidden_state: (D,).
        weights: (words of bin i, width of bin i) each; biases: (words of bin i,) each.
        projections: (D, width of bin i) each, or None.
        cluster_weight: (number of tails, width of bin 0); cluster_bias: (number of tails,); None without tails.
    """
    by_bin = []
    for index, (weight, bias, projection) in enumerate(zip(weights, biases, projections, strict=True)):
        state = hidden_state if projection is None else hidden_state @ projection
        logits = [row @ state + offset for row, offset in zip(weight, bias, strict=True)]
        if index == 0 and cluster_weight is not None:
            logits += [row @ state + offset for row, offset in zip(cluster_weight, cluster_bias, strict=True)]
        total = torch.stack(logits).logsumexp(dim=0)
        by_bin.append([logit - total for logit in logits])
    num_words = len(weights[0])
    head, columns = by_bin[0][:num_words], by_bin[0][num_words:]
    tails = [column + word for column, tail in zip(columns, by_bin[1:], strict=True) for word in tail]
    return head + tails


def adaptive_losses_reference(hidden_states: Tensor, labels: list[int], **softmax: object) -> Tensor:
    """Negative log-likelihoods (tokens,) of the labels in token order, 0 where a label is -100.

    Args:
        hidden_states: (tokens, D).
        labels: ids.
        softmax: the further arguments of `adaptive_log_probs_reference`.
    """
    losses = []
    for hidden_state, label in zip(hidden_states, labels, strict=True):
        if label == -100:
            losses.append(hidden_state.new_zeros(()))
        else:
            losses.append(-adaptive_log_probs_reference(hidden_state, **softmax)[label])
    return torch.stack(losses)
