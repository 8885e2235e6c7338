"""Merging tokens: bipartite matching, averages by group, and repeated halving.

Legend of shape suffixes: B batch, N tokens, C metric channels, D channels, R merged sources,
U unmerged sources, V destinations, M = U + V tokens after the merge, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.ops._common import (
    compute_dtype,
    full_precision,
    require_dims,
    require_shape,
    unit_rows,
)
from foveate.ops.group import (
    add_to_groups,
    flat_rows,
    halving_weights,
    scatter_mean,
    scatter_sum,
)

__all__ = [
    "Matching",
    "bipartite_matching",
    "gather_tokens",
    "halving_weights",
    "merge_matched",
    "scatter_mean",
    "scatter_sum",
    "unmerge",
]


@dataclass(frozen=True)
class Matching:
    """Which tokens fold into which, as positions in the original sequence.

    `merged_BR[:, i]` folds into `destination_BR[:, i]`; several sources may share a destination.
    `merged` is sorted by similarity, best pair first. `unmerged` is ascending or sorted by
    falling similarity; `all_destinations` is ascending.

    Example:
        >>> matching = bipartite_matching(torch.randn(1, 6, 4), 2)
        >>> tuple(matching.kept_BM.shape), tuple(matching.assignment_BN.shape)
        ((1, 4), (1, 6))
    """

    unmerged_BU: Tensor
    merged_BR: Tensor
    destination_BR: Tensor
    all_destinations_BV: Tensor
    num_protected: int = 0

    @property
    def num_source(self) -> int:
        """Tokens before the merge."""
        return self.num_kept + self.merged_BR.shape[1]

    @property
    def num_kept(self) -> int:
        """Tokens after the merge."""
        return self.unmerged_BU.shape[1] + self.all_destinations_BV.shape[1]

    @cached_property
    def kept_BM(self) -> Tensor:
        """Original positions of the output tokens [B, M], in output order.

        Unmerged sources, then destinations; with two protected tokens the second one (a
        destination by its place) moves behind the first.
        """
        U, V = self.unmerged_BU, self.all_destinations_BV
        if self.num_protected == 2:
            return torch.cat([U[:, :1], V[:, :1], U[:, 1:], V[:, 1:]], dim=1)
        return torch.cat([U, V], dim=1)

    @cached_property
    def assignment_BN(self) -> Tensor:
        """Output position of every original token [B, N]."""
        B, M = self.kept_BM.shape
        slot_BM = torch.arange(M, device=self.kept_BM.device).expand(B, M)
        out_BN = self.kept_BM.new_empty(B, self.num_source)
        out_BN.scatter_(1, self.kept_BM, slot_BM)
        return out_BN.scatter_(1, self.merged_BR, out_BN.gather(1, self.destination_BR))


def bipartite_matching(
    metric_BNC: Tensor,
    r: int,
    *,
    num_protected: int = 0,
    sort_unmerged: bool | None = None,
) -> Matching:
    """Pair the `r` most redundant even-placed tokens with their nearest odd-placed token.

    Sources are positions 0, 2, 4, .. and destinations 1, 3, 5, .. (with odd N one more source);
    similarity is the cosine of the metric. O(N^2 C / 4); no gradient. Ties: lowest index first.

    Args:
        metric_BNC: [B, N, C], for example keys averaged over heads.
        r: tokens to remove; clamped to (N - num_protected) // 2, r <= 0 merges nothing.
        num_protected: 0, 1 ([CLS] first) or 2 ([CLS] and a distillation token first); these are
            neither merged away nor merged into.
        sort_unmerged: True keeps unmerged sources in ascending order, False in order of falling
            similarity; None means True exactly when there are protected tokens.

    Returns:
        `Matching` with R = clamped r.

    Raises:
        ValueError: shapes do not fit, or `num_protected` is not 0, 1 or 2.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> matching = bipartite_matching(metric, 1)
        >>> matching.merged_BR.tolist(), matching.destination_BR.tolist()
        ([[2]], [[1]])

    Source: ToMe, section 3 (arXiv 2210.09461); AIM's merge before the LLM (arXiv 2412.03248) is
    `num_protected=0`.
    """
    require_dims(metric_BNC, 3, "metric", "[B, N, C]")
    if num_protected not in (0, 1, 2):
        raise ValueError(f"num_protected must be 0, 1 or 2, got {num_protected}")
    B, N, _ = metric_BNC.shape
    if num_protected > N:
        raise ValueError(f"cannot protect {num_protected} of {N} tokens")
    r = max(0, min(r, (N - num_protected) // 2))
    sort_unmerged = num_protected > 0 if sort_unmerged is None else sort_unmerged
    position = torch.arange(N, device=metric_BNC.device).expand(B, N)
    destinations_BV = position[:, 1::2]
    if r == 0:
        none = position[:, :0]
        return Matching(position[:, ::2], none, none, destinations_BV, num_protected)
    with torch.no_grad(), full_precision(metric_BNC.device):
        unit_BNC = unit_rows(metric_BNC)
        similarity = unit_BNC[:, ::2] @ unit_BNC[:, 1::2].transpose(-1, -2)
        if num_protected:
            similarity[:, 0] = -torch.inf
        if num_protected == 2:
            similarity[:, :, 0] = -torch.inf
        best, partner = similarity.max(-1)
        order = torch.sort(best, dim=-1, descending=True, stable=True).indices
    merged, unmerged = order[:, :r], order[:, r:]
    if sort_unmerged:
        unmerged = unmerged.sort(-1).values
    destination_BR = 2 * partner.gather(1, merged) + 1
    return Matching(2 * unmerged, 2 * merged, destination_BR, destinations_BV, num_protected)


def merge_matched(
    x_BND: Tensor, matching: Matching, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average matched tokens into their destinations and drop the sources.

    `y_b = x_b + sum_a w_a (x_a - x_b) / (w_b + sum_a w_a)` over the sources `a` of `b`: the
    weighted mean, written so that untouched tokens stay bit-identical and equal tokens merge
    exactly. O(N D). Gradients flow.

    Args:
        x_BND: [B, N, D].
        matching: from `bipartite_matching` on the same N tokens.
        weights: [B, N] size of every token, or None for ones.

    Returns:
        Merged tokens [B, M, D] in the dtype of `x`, and their summed weights [B, M] in float32.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> x = torch.tensor([[[0.0], [3.0], [9.0]]])
        >>> y, size = merge_matched(x, bipartite_matching(x, 1), weights=torch.ones(1, 3))
        >>> y.shape, size.sum().item()
        (torch.Size([1, 2, 1]), 3.0)

    Source: ToMe, section 3, "tracking token size" (arXiv 2210.09461).
    """
    require_dims(x_BND, 3, "x", "[B, N, D]")
    B, N, _ = x_BND.shape
    if matching.num_source != N:
        raise ValueError(f"x has {N} tokens but the matching was made for {matching.num_source}")
    wide = compute_dtype(x_BND.dtype)
    if weights is None:
        weights = x_BND.new_ones(B, N, dtype=wide)
    require_shape(weights, (B, N), "weights")
    weights = weights.to(wide)
    kept_BMD = gather_tokens(x_BND, matching.kept_BM)
    sizes_BM = weights.gather(1, matching.kept_BM)
    if matching.merged_BR.shape[1] == 0:
        return kept_BMD, sizes_BM
    source_weight_BR = weights.gather(1, matching.merged_BR)
    target_BR = matching.assignment_BN.gather(1, matching.destination_BR)
    sizes_BM = sizes_BM.scatter_add(1, target_BR, source_weight_BR)
    share_BR = source_weight_BR / sizes_BM.gather(1, target_BR)
    # These gathered tensors are ours, so the arithmetic is in place: at video sizes a fresh tensor
    # costs more than the sums.
    shift_BRD = gather_tokens(x_BND, matching.merged_BR).to(wide)
    shift_BRD -= gather_tokens(x_BND, matching.destination_BR)
    shift_BRD *= share_BR[..., None]
    merged_BMD = add_to_groups(kept_BMD.to(wide), shift_BRD, target_BR)
    return merged_BMD.to(x_BND.dtype), sizes_BM


def unmerge(y_BMD: Tensor, matching: Matching) -> Tensor:
    """Copy merged tokens back to every place they came from: [B, M, D] to [B, N, D].

    Args:
        y_BMD: [B, M, D] in the output order of the matching.
        matching: the one used to merge.

    Returns:
        [B, N, D]; the inverse of merging when merged tokens were equal.

    Raises:
        ValueError: the token count does not fit the matching.

    Example:
        >>> x = torch.randn(1, 6, 4)
        >>> matching = bipartite_matching(x, 2)
        >>> unmerge(merge_matched(x, matching)[0], matching).shape
        torch.Size([1, 6, 4])

    Source: ToMe, `unmerge` for dense prediction (arXiv 2210.09461).
    """
    require_dims(y_BMD, 3, "y", "[B, M, D]")
    if y_BMD.shape[1] != matching.num_kept:
        raise ValueError(f"y has {y_BMD.shape[1]} tokens, the matching keeps {matching.num_kept}")
    return gather_tokens(y_BMD, matching.assignment_BN)


def gather_tokens(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Take tokens by position: [B, N, D] and [B, K] give [B, K, D].

    Example:
        >>> gather_tokens(torch.arange(6.0).view(1, 3, 2), torch.tensor([[2]])).tolist()
        [[[4.0, 5.0]]]
    """
    B, N, D = x_BND.shape
    # Whole rows of the flattened tensor copy faster than an element-wise gather.
    flat_XD = x_BND.reshape(B * N, D).index_select(0, flat_rows(index_BK, N))
    return flat_XD.view(B, index_BK.shape[1], D)
