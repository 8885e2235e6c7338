"""DyCoke: drop what a frame repeats of an earlier one, then thin out the caches of deeper layers.

Legend: T frames, N patches of a frame (in `cache`: visual tokens of a sample), C compared frames,
K kept tokens, D channels, G key heads, d head channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import (
    Budget,
    CacheContext,
    Card,
    Count,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    count_by_plane,
    frames_of,
    relative_layer,
    with_special,
)


def similarity_to_earlier(x_TND: torch.Tensor, group: int) -> torch.Tensor:
    """Cosine of every patch with the one at its place in the frame that its frame is compared with.

    In groups of four, frames 1 and 2 are compared with frame 0 and frame 3 with frame 2; larger
    groups go on like this (frame i with frame i - s, s the lowest power of two in i).

    Args:
        x_TND: patches of all frames.
        group: frames in a group, a power of two.

    Returns:
        float32 [T, N]; +inf in the first frame of every group, which is compared with none.
        O(T N D).

    Source: DyCoke, section 3.2 (arXiv 2411.15024), for groups of four.
    """
    similarity_TN = torch.full(x_TND.shape[:2], torch.inf, device=x_TND.device)
    stride = 1
    while stride < group:
        frames = x_TND[::stride]
        pairs = len(frames) // 2
        if pairs:
            pair_P2ND = frames[: 2 * pairs].unflatten(0, (pairs, 2))
            found_PN = ops.adjacent_similarity(pair_P2ND)[:, 0]
            similarity_TN[stride :: 2 * stride][:pairs] = found_PN.float()
        stride *= 2
    return similarity_TN


@dataclass(frozen=True)
class DyCoke(Method):
    """DyCoke: temporal merging in groups of frames before the LLM, cache pruning inside it.

    The first frame of every group stays whole; of the others the patches least like those of the
    frame they are compared with. `retain` is the share of the video's patches that is left.

    Args:
        group: frames in a group, a power of two; None takes 4, and doubles it as long as the first
            frames alone exceed the budget.
        keep: share of a compared frame's patches that stays, instead of a share by the budget;
            the paper's merging ratio K is 1 - keep.
        layer: the layer from which on caches are thinned out: an index, at least 1, or a fraction
            of the depth.
        cache_retain: share of the visual tokens that these caches hold; 1 switches the stage off.
            The paper's pruning ratio P is 1 - cache_retain.
        released: what the released code does otherwise: of the last whole group the third frame
            stays whole, and the tokens of a frame come in order of rising similarity.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> DyCoke(keep=0.3).count(Grid.video(32, 14, 14, newlines_at_end=1), Budget(retain=0.5))
        Count(tokens=2961, exact=True)

    Source: arXiv 2411.15024, section 3.
    """

    group: int | None = None
    keep: float | None = None
    layer: int | float = 3
    cache_retain: float = 0.3
    released: bool = False

    card: ClassVar[Card] = Card(
        name="dycoke",
        title="DyCoke",
        paper="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
        arxiv="2411.15024",
        year=2024,
        url="https://github.com/KD-TAO/DyCoke",
        licence="Apache-2.0",
        stages=("projector", "cache"),
        kind="training-free",
        summary="Drops what frames repeat of earlier frames of their group, and prunes the caches "
        "of deeper layers by attention.",
        defaults={
            "LLaVA-OneVision-7B, 32 frames of 196 (released command)": "K = 0.7 (keep 0.3, retain "
            "0.475), L = 3, P = 0.7 (cache_retain 0.3)",
            "released code without options": "K = 0.3 (keep 0.7, retain 0.775), L = 3, P = 0.8",
        },
        headline=(
            "1.5 times faster inference and 1.4 times less memory than the untouched model, "
            "with slightly better accuracy (abstract)",
        ),
        notes=(
            "Patches that repeat are dropped; nothing is averaged, as in the released code.",
            "The second stage is static here: when the prompt has been read, caches from `layer` "
            "on keep the visual tokens that its last token attends to in the layer before, and "
            "the rest is gone. DyCoke proper chooses anew while it decodes whenever that attention "
            "has changed (cosine below 0.9) and brings tokens back from a side store; that is "
            "not built.",
            "The released code never removes keys: it gathers the chosen ones at every step, and "
            "where attention has not changed it uses all of them.",
            "Published groups have four frames, so at least a quarter stays; below that groups "
            "of 8, 16 .. continue the scheme, and one whole frame is the least.",
            "A last group that is not full is treated like the others; the released code loses "
            "the last frame of an odd number and fails on four frames or fewer.",
            "Images pass the first stage; the second prunes all visual tokens alike. Newlines of "
            "rows that still hold a patch, newlines at the end and [CLS] tokens stay.",
        ),
        retain=0.475,
    )

    def __post_init__(self) -> None:
        if self.group is not None and (self.group < 2 or self.group & (self.group - 1)):
            raise ValueError(f"group must be a power of two from 2 on (or None), got {self.group}.")
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise ValueError(f"keep must lie in [0, 1] (or be None), got {self.keep}.")
        if not 0 < self.cache_retain <= 1:
            raise ValueError(
                f"cache_retain is the share kept and must lie in (0, 1], got {self.cache_retain}; "
                "1 switches the stage off."
            )
        if self.layer <= 0:
            raise ValueError(
                f"layer = {self.layer}: tokens are ranked by the attention of the layer before, "
                "so it must be at least 1 (or a fraction of the depth)."
            )

    # -- before the language model --------------------------------------------------------------

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Exact; a bound where rows end in newlines."""
        if budget.is_full or grid.modality == "image" or not grid.is_uniform:
            return Count(grid.num_tokens)
        return count_by_plane(grid, self.kept_per_frame(grid, budget))

    def kept_per_frame(self, grid: Grid, budget: Budget) -> list[int]:
        """Patches of every frame that stay."""
        T, patches = len(grid.planes), grid.planes[0].num_patches
        group, share = self.schedule(T, budget.fraction(T * patches))
        some = math.floor(share * patches + 1e-6)
        kept = [patches if frame % group == 0 else some for frame in range(T)]
        if self.released:
            for frame in range(group // 2, T, group):
                # Its loop over groups ends before the last one.
                if frame - group // 2 >= T - group:
                    kept[frame] = patches
        return kept

    def schedule(self, num_frames: int, retain: float) -> tuple[int, float]:
        """Frames in a group, and the share that compared frames keep.

        Example:
            >>> DyCoke(keep=0.3).schedule(32, 0.1)
            (4, 0.3)
            >>> DyCoke().schedule(32, 0.25), DyCoke().schedule(32, 0.125)
            ((4, 0.0), (8, 0.0))
        """
        group = self.group or 4
        if self.keep is not None:
            return group, self.keep
        first = -(-num_frames // group)
        while self.group is None and first > 1 and first > retain * num_frames:
            group *= 2
            first = -(-num_frames // group)
        left = retain * num_frames - first
        return group, min(1.0, max(0.0, left / max(num_frames - first, 1)))

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Drop repeated patches of one video.

        Raises:
            ValueError: its frames differ in size.
        """
        grid = context.grid
        if context.budget.is_full or grid.modality == "image" or len(grid.planes) == 1:
            return None
        x_TND = frames_of(tokens, grid, self.name)
        T, N, _ = x_TND.shape
        group, _ = self.schedule(T, context.budget.fraction(T * N))
        counts = self.kept_per_frame(grid, context.budget)
        context.note(
            "groups", lambda: [(t, min(t + group, T) - 1) for t in range(0, T, group)], "frames"
        )
        similarity_TN = similarity_to_earlier(x_TND, group)
        context.note("similarity", similarity_TN, caption="to the same place in the earlier frame")
        rank_TN = similarity_TN.argsort(dim=1, stable=True).argsort(dim=1)
        count_T1 = torch.tensor(counts, device=tokens.device)[:, None]
        keep_TN = rank_TN < count_T1
        patch_P = grid.patch_index(tokens.device)
        kept_M = with_special(patch_P[keep_TN.flatten()], grid)
        if self.released:
            own_N = torch.arange(N, device=tokens.device)
            place_N = torch.zeros(grid.num_tokens, dtype=torch.long, device=tokens.device)
            place_N[patch_P] = rank_TN.where(count_T1 < N, own_N).flatten()
            time_M = grid.positions(tokens.device)[kept_M, 0]
            special_M = torch.ones_like(place_N).index_fill(0, patch_P, 0)[kept_M]
            key_M = (2 * time_M + special_M) * (N + 1) + place_N[kept_M]
            kept_M = kept_M[key_M.argsort(stable=True)]
        return Reduction.select(kept_M, tokens.num_tokens)

    # -- in the caches --------------------------------------------------------------------------

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer before the first thinned cache."""
        if self.cache_retain == 1:
            return ()
        return (self.first_layer(num_layers) - 1,)

    def first_layer(self, num_layers: int) -> int:
        """The first layer whose cache is thinned out.

        Raises:
            ValueError: the layer does not exist, or there is only one.
        """
        if num_layers < 2:
            raise ValueError("dycoke ranks cached tokens by an earlier layer; this model has one.")
        return max(1, relative_layer(self.layer, num_layers))

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when `layer` does not exist."""
        if num_layers is not None:
            self.attention_layers(num_layers)

    def cache(
        self, keys_BGNd: torch.Tensor, values_BGNd: torch.Tensor, context: CacheContext
    ) -> Reduction | None:
        """Keep the same tokens in every layer from `layer` on, ascending."""
        N = keys_BGNd.shape[2]
        if context.budget.is_full or N == 0 or self.cache_retain == 1:
            return None
        first = self.first_layer(context.num_layers)
        if context.layer < first:
            return None
        if "kept" not in context.state:
            score_N = context.last_token_attention(first - 1)
            kept_K = ops.top_k(score_N, max(1, math.floor(N * self.cache_retain)))
            context.state["kept"] = context.id_N[kept_K]
            context.note("attention", score_N, caption="of the last token, in the layer before")
        keep_N = torch.isin(context.id_N, context.state["kept"])
        return Reduction.select(keep_N.nonzero()[:, 0], N)
