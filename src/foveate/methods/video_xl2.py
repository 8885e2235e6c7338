"""Video-XL-2: read a long video block by block, answer from dense and pooled keys and values.

Legend: N visual tokens of one sample, U units (a unit: some frames), C chunks of units, M entries
left in the cache, G key heads, d head channels, D channels, T text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import Budget, CacheContext, Card, Method, Reduction
from foveate.core.blocks import Blocks, PrefillContext

#: Gives every unit of a sample a score, [U]; larger is more relevant to the question.
UnitScorer = Callable[[PrefillContext, torch.Tensor], torch.Tensor]

#: Pooling window of the released settings, and units in a chunk of theirs.
WINDOW, CHUNK = 4, 4


def number_units(
    position_N3: torch.Tensor, item_N: torch.Tensor, unit_frames: int = 1
) -> torch.Tensor:
    """Unit of every visual token, int64 [N]: `unit_frames` frames of one item, in prompt order.

    Example:
        >>> time_N = torch.tensor([0, 0, 1, 1, 2, 2])
        >>> position_N3 = torch.stack([time_N, time_N, time_N], dim=1)
        >>> number_units(position_N3, torch.zeros(6).long(), unit_frames=2).tolist()
        [0, 0, 0, 0, 1, 1]
    """
    time_N = position_N3[:, 0].to(item_N.device).long() // unit_frames
    pair_N2 = torch.stack([item_N, time_N], dim=1)
    return pair_N2.unique(dim=0, return_inverse=True)[1]


def relevance(x_ND: torch.Tensor, unit_N: torch.Tensor, text_TD: torch.Tensor) -> torch.Tensor:
    """Cosine of every unit's mean visual token with the mean text token, float32 [U].

    Both are taken relative to the mean over the units, so that what all frames share does not
    count. The published system ranks with a retriever of its own; this choice is ours. O(N D).
    """
    if unit_N.numel() == 0:
        return x_ND.new_zeros(0, dtype=torch.float32)
    num = int(unit_N.max()) + 1
    mean_UD = ops.scatter_mean(x_ND[None].float(), unit_N[None], num)[0]
    if text_TD.shape[0] == 0:
        return mean_UD.new_zeros(num)
    centre_D = mean_UD.mean(dim=0)
    text_1D = (text_TD.float().mean(dim=0) - centre_D)[None]
    return ops.cosine_similarity_matrix(mean_UD - centre_D, text_1D)[:, 0]


def pooled_length(size: int, window: int) -> int:
    """Entries of a pooled unit of `size` tokens: whole windows, at least one.

    Example:
        >>> pooled_length(144, 4), pooled_length(9, 4), pooled_length(3, 4)
        (36, 2, 1)
    """
    return max(1, size // window) if size else 0


def cache_length(
    sizes: Sequence[int], dense: Sequence[bool], window: int, num_text: int = 0
) -> int:
    """Entries of the rebuilt cache, n': dense units whole, the others pooled, text unchanged.

    Args:
        sizes: visual tokens of every unit.
        dense: which units stay whole.
        window: pooling window.
        num_text: prefix and timestamp tokens.

    Example:
        >>> cache_length([144] * 4, [True, False, False, True], window=4, num_text=40)
        400
    """
    left = [n if d else pooled_length(n, window) for n, d in zip(sizes, dense, strict=True)]
    return num_text + sum(left)


def pool_units(
    unit_N: torch.Tensor, dense_U: torch.Tensor, window: int, *, drop_tail: bool = False
) -> Reduction:
    """Keep the tokens of dense units, average the others over windows of `window` tokens.

    Args:
        unit_N: unit of every token, int64 [N].
        dense_U: which units stay whole, bool [U].
        window: tokens averaged into one.
        drop_tail: drop what is left behind the last whole window, as the released code does;
            otherwise it joins that window.

    Source: bi-level decoding of Video-XL-2 (arXiv 2506.19225).
    """
    N, num = unit_N.shape[0], dense_U.shape[0]
    order_N = unit_N.argsort(stable=True)
    size_U = torch.bincount(unit_N, minlength=num)
    first_U = size_U.cumsum(0) - size_U
    rank_N = torch.empty_like(unit_N)
    rank_N[order_N] = torch.arange(N, device=unit_N.device) - first_U[unit_N[order_N]]
    pooled_U = (size_U // window).clamp(min=1).minimum(size_U)
    left_U = torch.where(dense_U, size_U, pooled_U)
    place_N = torch.where(dense_U[unit_N], rank_N, rank_N // window)
    tail_N = place_N >= left_U[unit_N]
    place_N = place_N.minimum(left_U[unit_N] - 1)
    target_N = (left_U.cumsum(0) - left_U)[unit_N] + place_N
    if drop_tail:
        target_N = target_N.masked_fill(tail_N, -1)
    return Reduction.merge(target_N, int(left_U.sum()))


@dataclass(frozen=True)
class VideoXL2(Method):
    """Video-XL-2's two rules for keys and values: block-wise prefill and bi-level decoding.

    The prompt is read in blocks of frames that see only the blocks right before them; text between
    frames sees and is seen by all. The question then attends to a rebuilt cache: chunks that matter
    for it whole, all others averaged over windows of tokens, before rotary positions.

    The budget is the fraction of visual cache entries left. `compression` decides what pooled units
    take of it, dense chunks get the rest: the most relevant one, the first and the last, then
    others by relevance, as long as they fit.

    Args:
        unit_frames: frames of a unit as the language model sees them (a temporal patch of two
            frames counts once). An image is a unit.
        block_units: units of a block of the prefill.
        previous_blocks: blocks before its own that a block sees; as many as there are blocks give
            plain causal attention.
        chunk_units: units of a chunk of the cache; None: 4, fewer where that makes under 8 chunks.
        compression: pooling window in tokens. None: so that pooling everything takes half of the
            budget, at least 4; then smaller again where whole chunks leave room.
        top_k: most relevant chunks that are kept whole; None: as many as the budget allows.
        chunks: numbers of the chunks that are kept whole, from 0 (whatever the budget says);
            replaces the ranking.
        ends: keep the first and the last chunk whole, too (with `chunks`: always).
        scorer: `scorer(context, unit_N)` gives the relevance of every unit, [U]. Default: see
            `relevance`. A recipe with a scorer cannot be saved.
        drop_tail: drop the tokens of a unit behind its last whole window, as the released code.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget
        >>> VideoXL2().window(Budget(retain=0.5)), VideoXL2().window(Budget(retain=0.1))
        (4, 20)

    Source: arXiv 2506.19225 and the released code.
    """

    unit_frames: int = 1
    block_units: int = 4
    previous_blocks: int = 3
    chunk_units: int | None = None
    compression: int | None = None
    top_k: int | None = None
    chunks: tuple[int, ...] | None = None
    ends: bool = True
    scorer: UnitScorer | None = None
    drop_tail: bool = False

    card: ClassVar[Card] = Card(
        name="video_xl2",
        title="Video-XL-2",
        paper="Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV "
        "Sparsification",
        arxiv="2506.19225",
        year=2025,
        url="https://github.com/VectorSpaceLab/Video-XL",
        licence="Apache-2.0",
        stages=("cache",),
        kind="training-free",
        summary="Reads a video in blocks; answers from whole and averaged keys and values.",
        defaults={
            "MLVU, 256 frames": "block_units 4, previous_blocks 3, chunk_units 4, compression 4, "
            "4 to 8 retrieved units of 8 frames",
            "VideoMME, 400 frames": "block_units 4, previous_blocks 3, chunk_units 6 or 12, "
            "compression 4, 2 to 8 retrieved",
            "LongVideoBench, 400 frames": "block_units 4, previous_blocks 3, chunk_units 6, "
            "compression 4, 6 to 8 retrieved",
            "LVBench, 600 frames": "block_units 4, previous_blocks 11, chunk_units 16, "
            "compression 4, 4 to 6 retrieved",
        },
        headline=(
            "Video-XL-2: MLVU 74.9, VideoMME 66.4, LVBench 48.6 (project page); 74.8, 66.6 and "
            "48.6 with block-wise prefill and bi-level decoding (logs of the released code)",
        ),
        notes=(
            "The two rules for keys and values, on any model. The temporal compression before the "
            "language model and the written timestamps belong to the trained model: here a unit is "
            "a frame, and timestamps are whatever text a family writes between frames.",
            "Attention runs block by block and computes only what the blocks see; the released "
            "code masks a dense matrix and counts the saving.",
            "The question runs once, on the rebuilt cache: its first run over the whole cache, "
            "which the released code throws away, is left out.",
            "Relevance is the similarity of the question's embeddings with the mean visual token "
            "of each unit, ours; the published runs read retrieval results from files, with "
            "settings tuned per benchmark. Give your own retriever as `scorer` or `chunks`.",
            "The budget and how it is shared between dense and pooled units are ours.",
            "A unit's tokens behind the last whole window join that window; drop_tail=True drops "
            "them as the released code does. The counts are the same.",
            "Positions are contiguous after the rebuild; with M-RoPE, and with "
            'positions="original", entries keep theirs and pooled ones take the mean.',
        ),
        positions="compact",
        retain=0.5,
    )

    def __post_init__(self) -> None:
        for name in ("unit_frames", "block_units", "chunk_units", "compression"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("previous_blocks", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}.")
        if self.chunks is not None:
            object.__setattr__(self, "chunks", tuple(self.chunks))
            wrong = [c for c in self.chunks if isinstance(c, bool) or not isinstance(c, int)]
            if wrong or any(chunk < 0 for chunk in self.chunks):
                raise ValueError(
                    f"chunks must be whole numbers from 0 (the first chunk), got {self.chunks}."
                )

    def window(self, budget: Budget) -> int:
        """The pooling window under a budget of one sample, in tokens."""
        if self.compression is not None:
            return self.compression
        # Pooling everything takes 1 / window of the entries: half of the budget at most.
        retain = budget.retain
        assert retain is None or isinstance(retain, float | int)
        return WINDOW if retain is None else max(WINDOW, math.ceil(2 / retain))

    # -- stages ---------------------------------------------------------------------------------

    def prefill(self, context: PrefillContext) -> Blocks | None:
        """Blocks of a sample, and what `cache` will need of the question."""
        if context.budget.is_full or context.item_N.numel() == 0:
            return None
        unit_N = number_units(context.position_N3, context.item_N, self.unit_frames)
        if self.chunks is None:
            context.state["relevance"] = score_U = self._scores(context, unit_N)
            context.note("relevance", lambda: score_U[unit_N], caption="of a unit to the question")
        context.note("blocks", unit_N // self.block_units, "label", "read one after the other")
        return Blocks(unit_N // self.block_units, self.previous_blocks)

    def _scores(self, context: PrefillContext, unit_N: torch.Tensor) -> torch.Tensor:
        if self.scorer is None:
            return relevance(context.x_ND, unit_N, context.text_TD)
        score_U = torch.as_tensor(self.scorer(context, unit_N)).float()
        num = int(unit_N.max()) + 1
        if score_U.shape != (num,):
            raise ValueError(
                f"The scorer must give one score per unit, [{num}], got {tuple(score_U.shape)}."
            )
        return score_U

    def cache(
        self, keys_BGNd: torch.Tensor, values_BGNd: torch.Tensor, context: CacheContext
    ) -> Reduction | None:
        """Dense and pooled entries, the same in every layer."""
        if context.budget.is_full or keys_BGNd.shape[2] == 0:
            return None
        state = context.state
        if "reduction" not in state:
            item_N = context.item_N.to(keys_BGNd.device)
            unit_N = number_units(context.position_N3, item_N, self.unit_frames)
            sizes = torch.bincount(unit_N).tolist()
            budget = context.budget
            if budget.tokens is not None:
                budget = type(budget)(retain=budget.fraction(sum(sizes)))
            dense = self.dense_units(sizes, budget, state.get("relevance"))
            window = self._fitted_window(sizes, dense, budget)
            dense_U = torch.tensor(dense, device=keys_BGNd.device)
            reduction = pool_units(unit_N, dense_U, window, drop_tail=self.drop_tail)
            context.note("dense units", dense_U[unit_N], "mark", "the others are pooled")
            state["reduction"] = None if reduction.num_out == len(unit_N) else reduction
        return state["reduction"]

    def _fitted_window(self, sizes: Sequence[int], dense: Sequence[bool], budget: Budget) -> int:
        """The window, made smaller where whole chunks have left room in the budget."""
        widest, most = self.window(budget), budget.count(sum(sizes))
        if self.compression is not None or self.chunks is not None:
            return widest
        fitting = (m for m in range(2, widest) if cache_length(sizes, dense, m) <= most)
        return next(fitting, widest)

    def dense_units(
        self, sizes: Sequence[int], budget: Budget, score_U: torch.Tensor | None = None
    ) -> list[bool]:
        """Which units stay whole.

        Args:
            sizes: visual tokens of every unit.
            budget: of the sample, as a fraction.
            score_U: relevance of every unit; a chunk counts as its best one. None: all alike.
        """
        per_chunk = self.chunk_units or max(1, min(CHUNK, len(sizes) // 8))
        chunk_of = [unit // per_chunk for unit in range(len(sizes))]
        num, window = chunk_of[-1] + 1, self.window(budget)
        edges = [0, num - 1] if self.ends else []
        if self.chunks is not None:
            wrong = [chunk for chunk in self.chunks if chunk >= num]
            if wrong:
                raise ValueError(
                    f"chunks names {wrong}, but the video has {num} chunks of {per_chunk} units "
                    f"({len(sizes)} units); numbers start at 0."
                )
            # Nothing retrieved means nothing to prefer: all stay whole, as in the released code.
            chosen = {*self.chunks, *edges} if self.chunks else set(range(num))
            return [chunk in chosen for chunk in chunk_of]
        scores = [0.0] * len(sizes) if score_U is None else score_U.tolist()
        best = [-math.inf] * num
        for chunk, score in zip(chunk_of, scores, strict=True):
            best[chunk] = max(best[chunk], score)
        ranked = sorted(range(num), key=lambda chunk: -best[chunk])[: self.top_k]
        left = budget.count(sum(sizes)) - sum(pooled_length(n, window) for n in sizes)
        chosen = set()
        for chunk in dict.fromkeys([*ranked[:1], *edges, *ranked[1:]]):
            mine = sizes[chunk * per_chunk : (chunk + 1) * per_chunk]
            more = sum(n - pooled_length(n, window) for n in mine)
            if more <= left:
                left -= more
                chosen.add(chunk)
        return [chunk in chosen for chunk in chunk_of]
