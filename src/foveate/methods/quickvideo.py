"""QuickVideo: keep the visual keys and values of small key norm in the cache of every layer.

Legend: G key heads, N visual tokens of one sample, d head channels, P tokens already in the cache,
q new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from foveate.core import Budget, CacheContext, Card, Method, Reduction

Score = Literal["key_norms_small", "value_norms"]
Decay = Literal["none", "linear", "exponential"]


def norm_scores(
    keys_BGNd: torch.Tensor, values_BGNd: torch.Tensor, score: Score = "key_norms_small"
) -> torch.Tensor:
    """Score of every cache entry, over all key heads together; larger is better. [B, N] float32.

    A rotary embedding does not change the norm, so positions play no part.
    """
    if score == "value_norms":
        return torch.linalg.vector_norm(values_BGNd.float(), dim=(1, 3))
    return -torch.linalg.vector_norm(keys_BGNd.float(), dim=(1, 3))


def prune_keys(
    keys_BGTd: torch.Tensor,
    values_BGTd: torch.Tensor,
    past_len: int,
    *,
    retain: float = 0.5,
    top_k: int | None = None,
    score: Score = "key_norms_small",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drop entries of the newest group from a cache of one sample; earlier ones stay untouched.

    Args:
        keys_BGTd: [1, G, P + q, d], the group's keys last.
        values_BGTd: values, alike.
        past_len: P.
        retain: fraction of the group that stays, rounded down.
        top_k: most entries that stay; None for no limit.
        score: "key_norms_small" or "value_norms" (large ones stay).

    Returns:
        Kept positions within the group, ascending int64 [k], and the shortened keys and values.

    Source: QuickVideo, section 3.3 (arXiv 2505.16175).
    """
    fresh = slice(past_len, None)
    scores_N = norm_scores(keys_BGTd[:, :, fresh], values_BGTd[:, :, fresh], score)[0]
    group_N = torch.zeros_like(scores_N, dtype=torch.long)
    keep_k = _keep_in_groups(scores_N, group_N, [_keep(len(scores_N), retain, top_k)])
    past_P = torch.arange(past_len, device=keep_k.device)
    index_T = torch.cat([past_P, keep_k + past_len])
    return keep_k, keys_BGTd[:, :, index_T], values_BGTd[:, :, index_T]


@dataclass(frozen=True)
class QuickVideo(Method):
    """QuickVideo's cache stage: in every layer and group of frames, small key norms stay.

    `foveate.ask` and `foveate.prefill` read the clip group by group with it, as published; then a
    group is their chunk. One choice per layer, shared by its key heads. Hidden states are not
    pruned: every layer still computes all tokens of the prompt, and later tokens attend to fewer.

    Args:
        group_frames: frames of a group as the language model sees them (a temporal patch of two
            frames counts once), at most; a prompt that is read chunk by chunk has a group per
            chunk.
        score: "key_norms_small", or "value_norms" (large ones stay).
        top_k: most entries of a group, beside the budget.
        decay: how the number kept shrinks with depth: "none", "linear" or "exponential".
        decay_factor: factor per layer of the exponential decay.
        start_layer: first layer that is pruned: an index, or a fraction of the depth.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget
        >>> QuickVideo().kept(96, Budget(retain=0.2)), QuickVideo(top_k=8).kept(96, Budget(0.2))
        (19, 8)

    Source: arXiv 2505.16175, section 3.3, and the released code for the options.
    """

    group_frames: int = 16
    score: Score = "key_norms_small"
    top_k: int | None = None
    decay: Decay = "none"
    decay_factor: float = 0.9
    start_layer: int | float = 0

    card: ClassVar[Card] = Card(
        name="quickvideo",
        title="QuickVideo",
        paper="QuickVideo: Real-Time Long Video Understanding with System Algorithm Co-Design",
        arxiv="2505.16175",
        year=2025,
        url="https://github.com/TIGER-AI-Lab/QuickVideo",
        licence="MIT",
        stages=("cache",),
        kind="training-free",
        summary="Keeps the keys of small norm of every group of frames in the cache of every "
        "layer.",
        defaults={
            "Qwen2.5-VL-7B, accuracy": "groups of 16 frames, retain 0.5",
            "Qwen2.5-VL-7B, latency": "groups of 32 frames, retain 0.2",
        },
        headline=(
            "Qwen2.5-VL-7B, retain 0.5, mean of VideoMME, LongVideoBench, LVBench and MLVU: "
            "59.97 to 58.22 at 256 frames, 57.05 to 56.78 at 1024 frames",
            "Share of the full score at 256 frames for retain 0.1 / 0.2 / 0.5 / 0.8: "
            "85.2 / 90.6 / 97.1 / 99.6 %",
        ),
        notes=(
            'The whole system is `foveate.ask(..., "quickvideo")` and `foveate.prefill`: parallel '
            "decoding, prefill group by group with the past that stayed, and the overlap of both; "
            "a group is their chunk.",
            "On a model that is called by other means the prompt is prefilled in one go: tokens of "
            "later groups attend to all earlier ones. What stays of the first group is the same.",
            "The released code's score by the attention of the question (query_attention_weights) "
            "is missing: it scored below key norms in the paper and reads the question with every "
            "group.",
            "Text is never dropped; the released code also prunes the system prompt.",
            "The released example keeps 64 entries of every 16 frames, far less than the published "
            "0.5; top_k=64 gives that.",
            "Images form a group of their own and are pruned like frames.",
        ),
        positions="original",
        retain=0.5,
    )

    def __post_init__(self) -> None:
        if self.group_frames < 1:
            raise ValueError(f"group_frames must be at least 1 frame, got {self.group_frames}.")
        if self.score not in ("key_norms_small", "value_norms"):
            raise ValueError(
                f'score must be "key_norms_small" or "value_norms", got {self.score!r}.'
            )
        if self.decay not in ("none", "linear", "exponential"):
            raise ValueError(
                f'decay must be "none", "linear" or "exponential", got {self.decay!r}.'
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 entry (or None), got {self.top_k}.")
        if not 0 < self.decay_factor <= 1:
            raise ValueError(f"decay_factor must lie in (0, 1], got {self.decay_factor}.")
        if self.start_layer < 0:
            raise ValueError(f"start_layer must be 0 or more, got {self.start_layer}.")

    def cache(
        self, keys_BGNd: torch.Tensor, values_BGNd: torch.Tensor, context: CacheContext
    ) -> Reduction | None:
        """Choose the entries of one layer that stay, ascending."""
        N = keys_BGNd.shape[2]
        start = self.start_layer
        first = round(start * context.num_layers) if isinstance(start, float) else start
        if context.budget.is_full or N == 0 or context.layer < first:
            return None
        time_N = context.position_N3[:, 0].to(keys_BGNd.device).long()
        item_N = context.item_N.to(keys_BGNd.device)
        pair_N2 = torch.stack([item_N, time_N // self.group_frames], dim=1)
        _, group_N, sizes = pair_N2.unique(dim=0, return_inverse=True, return_counts=True)
        counts = [self._count(size, N, context) for size in sizes.tolist()]
        scores_N = norm_scores(keys_BGNd, values_BGNd, self.score)[0]
        context.note(self.score.replace("_", " "), scores_N, caption="the highest of a group stay")
        context.note("groups", group_N, "label", "frames that share a count")
        return Reduction.select(_keep_in_groups(scores_N, group_N, counts), N)

    def kept(self, size: int, budget: Budget, layer: int = 0, num_layers: int = 1) -> int:
        """Entries of a group of `size` that stay in a layer, when the sample is that group."""
        context = CacheContext(budget, layer=layer, num_layers=num_layers)
        return self._count(size, size, context)

    def _count(self, size: int, num_tokens: int, context: CacheContext) -> int:
        keep = _keep(size, context.budget.fraction(num_tokens), self.top_k)
        if keep == size or self.decay == "none":
            return keep
        if self.decay == "linear":
            return keep - keep * context.layer // max(context.num_layers, 1)
        return max(1, math.floor(keep * self.decay_factor**context.layer))


def _keep(size: int, retain: float, top_k: int | None) -> int:
    """Entries of a group that stay; a group too small to keep any is left whole."""
    keep = min(size if top_k is None else top_k, math.floor(retain * size))
    return size if keep == 0 else keep


def _keep_in_groups(
    scores_N: torch.Tensor, group_N: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """The best `counts[g]` of every group g, ascending; equal scores go to the lower index."""
    best_first_N = scores_N.sort(descending=True, stable=True).indices
    order_N = best_first_N[group_N[best_first_N].sort(stable=True).indices]
    sorted_N = group_N[order_N]
    size_G = torch.bincount(group_N, minlength=len(counts))
    first_G = size_G.cumsum(0) - size_G
    rank_N = torch.arange(len(order_N), device=order_N.device) - first_G[sorted_N]
    count_G = torch.tensor(counts, device=order_N.device)
    return order_N[rank_N < count_G[sorted_N]].sort().values
