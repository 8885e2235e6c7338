"""B-VLLM: few mixtures of frames by the question, alike ones joined, each under one budget.

Legend: T frames of a video, L patches of one, K rows (query-frames), R rows that are left, n tokens
of a row, D channels, N tokens of the item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    count_by_plane,
    frames_of,
    merge_by_anchor,
    merge_by_plane,
    merged_groups,
    take_planes,
)
from foveate.methods._frame_sizes import matched_down

Chains = Literal["follow", "drop"]
Compare = Literal["neighbours", "all"]
Order = Literal["raster", "released"]


def soft_selector(
    logits_KT: torch.Tensor, tau: float = 0.5, noise_KT: torch.Tensor | None = None
) -> torch.Tensor:
    """How every row is mixed of the frames: softmax((logits + noise) / tau), float32 [K, T].

    Args:
        logits_KT: of every row for every frame; -inf keeps a frame out of a row.
        tau: temperature.
        noise_KT: Gumbel noise, which the released code adds at inference, too; None: none.

    Example:
        >>> soft_selector(torch.tensor([[0.0, 0.0, -torch.inf]])).tolist()
        [[0.5, 0.5, 0.0]]

    Source: B-VLLM (arXiv 2412.09919), temporal frame selection.
    """
    if noise_KT is not None:
        logits_KT = logits_KT + noise_KT
    return torch.softmax(logits_KT.float() / tau, dim=-1)


def row_windows(share_T: torch.Tensor, num: int) -> torch.Tensor:
    """Which of `num` stretches of time every frame belongs to, int64 [T], from 0, ascending.

    Stretches share the relevance evenly, as far as frames are not to be divided: a frame whose
    relevance would fill more than one stands alone, and the others share what is left. This is
    systematic sampling with probabilities proportional to size. O(T log T), on the CPU.

    Args:
        share_T: relevance of the frames, above 0, in any unit.
        num: K, 1 <= K <= T.

    Raises:
        ValueError: `num` is out of range.

    Example:
        >>> row_windows(torch.tensor([1.0, 1, 1, 1, 40, 1, 1, 1, 1]), 3).tolist()
        [0, 0, 0, 0, 1, 2, 2, 2, 2]
    """
    T = len(share_T)
    if not 1 <= num <= T:
        raise ValueError(f"{T} frames make 1 to {T} stretches, got {num}.")
    # Rows that every frame fills, at most one: the largest are capped until the rest fits.
    share_T = share_T.detach().cpu().double().clamp(min=1e-100)
    order_T = share_T.sort(descending=True, stable=True)
    rest_T = order_T.values.flip(0).cumsum(0).flip(0)
    fits_T = (num - torch.arange(T)) * order_T.values <= rest_T * (1 + 1e-12)
    capped = int(fits_T.long().argmax())
    filled_T = torch.ones_like(share_T)
    scale = (num - capped) / rest_T[capped]
    filled_T[order_T.indices[capped:]] = order_T.values[capped:] * scale
    middle_T = filled_T.cumsum(0) - filled_T / 2
    # The first frame of every stretch; rounding must leave none of them empty.
    row_K = torch.arange(num)
    first_K = torch.searchsorted(middle_T, row_K.double())
    first_K = ((first_K - row_K).cummax(0).values + row_K).minimum(T - num + row_K)
    return torch.searchsorted(first_K, torch.arange(T), right=True) - 1


def join_rows(link_K: torch.Tensor, chains: Chains = "follow") -> Reduction:
    """Rows that stay, each the mean of itself and of those linked to it, in their order.

    Args:
        link_K: the earlier row that each row is joined to, -1 for none.
        chains: a row linked to a row that is itself linked goes with it to the "follow" end of the
            chain; "drop" loses it, as the released code does.

    Example:
        >>> link_K = torch.tensor([-1, 0, 1, -1])
        >>> join_rows(link_K).matrix()[0].tolist()[0][2] > 0.33
        True
        >>> join_rows(link_K, "drop").matrix().tolist()
        [[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]]

    Source: B-VLLM (arXiv 2412.09919), temporal merging; "follow" is ours.
    """
    stays_K = link_K < 0
    own_K = torch.arange(len(link_K), device=link_K.device)
    home_K = ops.follow_links(link_K) if chains == "follow" else link_K.where(~stays_K, own_K)
    slot_K = (stays_K.long().cumsum(0) - 1).masked_fill(~stays_K, -1)[home_K]
    kept_R = stays_K.nonzero()[:, 0]
    return Reduction.merge(slot_K, len(kept_R), anchor_BM=kept_R[None])


def condense(x_BLD: torch.Tensor, num: int, order: Order = "raster") -> Reduction:
    """Rounds of bipartite matching, at most half of the tokens each, until `num` are left.

    O(B L^2 D).

    Args:
        x_BLD: tokens of B rows.
        num: n, 1 <= n <= L.
        order: "raster" puts every token at the place of the one that took others in; "released"
            lists unmatched tokens by falling similarity, then destinations.

    Source: B-VLLM (arXiv 2412.09919), spatial merging; the order of places is ours.
    """
    merged = matched_down(x_BLD, num)
    if order == "released" or num == x_BLD.shape[1]:
        return merged
    return merged.then(Reduction.select(merged.anchor_BM.argsort(dim=1), num))


def row_similarity(y_KLD: torch.Tensor, compare: Compare = "neighbours") -> torch.Tensor:
    """(cosine + 1) / 2 of rows patch for patch, less the mean of all their patches: [K, K].

    -inf where rows are not compared. O(K L D), or O(K^2 L D) for "all".

    Args:
        y_KLD: rows.
        compare: every row with the one before, or with all earlier ones.
    """
    K, device = len(y_KLD), y_KLD.device
    x_KX = (y_KLD - y_KLD.float().mean((0, 1))).flatten(1).float()
    if compare == "all":
        cosine_KK = ops.cosine_similarity_matrix(x_KX)
    else:
        cosine_KK = torch.full((K, K), -torch.inf, device=device)
        cosine_KK.diagonal(-1).copy_(ops.adjacent_similarity(x_KX[:, None])[:, 0])
    # Rounding must not lift equal rows above a threshold of 1.
    return (cosine_KK.clamp(max=1) + 1) / 2


@dataclass(frozen=True)
class BVLLM(Method):
    """B-VLLM without training: mixtures of frames by the question, merged over time and space.

    A video becomes a few rows, each a mixture of the frames of a stretch of time, weighted by how
    well they fit the question; stretches are shorter where the video fits it better. Rows like the
    one before are averaged with it, and every row that is left has an equal part of the budget,
    which its patches are merged down to. Every patch feeds at most one token. The planes of an
    image are only merged down. O(N D + K L^2 D) beside the signal.

    Args:
        queries: rows of a video, at most half as many as frames; more where the budget holds more
            whole frames than that.
        tau: temperature of the selector.
        threshold: rows that are more alike than this, (cosine + 1) / 2, are joined; 1 joins none.
            Never so many that the rows left could not hold the budget.
        compare: rows are compared with the one before ("neighbours", as in the paper), or with all
            earlier ones ("all", as in the released code).
        chains: what becomes of a row that is linked to a linked row, see `join_rows`.
        noise: add Gumbel noise to the selector, as the released code does at inference, too.
        order: of the tokens of a row, see `condense`.

    Raises:
        ValueError: a value is unknown or out of range.

    Example:
        >>> BVLLM().count(Grid.video(32, 14, 14), Budget(tokens=576))
        Count(tokens=576, exact=True)
        >>> BVLLM().num_rows(32, 196, 576), BVLLM().num_rows(12, 196, 1568)
        (16, 8)

    Source: arXiv 2412.09919.
    """

    queries: int = 16
    tau: float = 0.5
    threshold: float = 0.75
    compare: Compare = "neighbours"
    chains: Chains = "follow"
    noise: bool = False
    order: Order = "raster"

    card: ClassVar[Card] = Card(
        name="b_vllm",
        title="B-VLLM",
        paper="B-VLLM: A Vision Large Language Model with Balanced Spatio-Temporal Tokens",
        arxiv="2412.09919",
        year=2024,
        url="https://github.com/zhuqiangLu/B-VLLM",
        licence="Apache-2.0",
        stages=("projector",),
        kind="trained",
        summary="Mixes the frames of a video into few rows by the question, joins rows that are "
        "alike and merges the patches of each under one budget.",
        defaults={
            "EVA-CLIP ViT-g/14, Qwen2-7B": "16 queries, tau 0.5, threshold 0.75, 32 tokens per "
            "row, a budget of 576: at most 512 tokens of 16 or 32 frames of 576 patches",
        },
        headline=("About 10 % more on MVBench (abstract of the second version)",),
        notes=(
            "The training-free half: selector, mixture, temporal and spatial merging. The two "
            "Q-Formers, their projections and the tuned language model are no part of it.",
            "Logits are ours. Without the Q-Former there is one query, the question: a frame's "
            "logit is text.frame_similarity, standardised over the video. Rows differ by the "
            "stretch of time they may look at; stretches share the selector's mass evenly, so "
            "that relevant times have more rows, and rows come in the order of time.",
            "Give a CLIP-like model with foveate.reduce(..., companion=foveate.Companion(...)); "
            "without one, frames are compared with the instruction in the language model's space.",
            "Rows of different stretches share no frame, so their selector rows, which the "
            "released code compares, never resemble each other. As in the paper, what they show "
            "is compared instead: all patches of two rows, less the mean patch of the video.",
            "The released code loses rows at the end of a chain of links (chains='drop'), adds "
            "noise at inference (noise=True), and loses the order of patches (order='released'). "
            "Its spatial merging cannot trigger with 16 queries, because 576 / 16 exceeds the 32 "
            "tokens of a row; here it is what meets the budget, exactly. Of an odd number of "
            "patches to be halved it leaves one too many; here one more round follows.",
            "A token has the place of the patch that took the others in, in the frame that counts "
            "most in its row, so it also has that frame's time position.",
            "Images have no frames to choose from: every plane is merged down to its share.",
            "Newline and [CLS] tokens come on top of the budget.",
        ),
        retain=0.0625,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("text.frame_similarity",)

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1 row, got {self.queries}.")
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}.")
        choices = {"compare": Compare, "chains": Chains, "order": Order}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name} must be {' or '.join(map(repr, get_args(known)))}, "
                    f"got {getattr(self, name)!r}."
                )

    # -- counting ahead -------------------------------------------------------------------------

    def num_rows(self, frames: int, size: int, keep: int) -> int:
        """Rows that a video of `frames` frames of `size` patches has before alike ones are joined.

        Args:
            frames: T.
            size: L.
            keep: tokens left, 1 <= keep <= T L.
        """
        rows = max(min(self.queries, -(-frames // 2)), -(-keep // size))
        return min(rows, keep)

    def count(self, grid: Grid, budget: Budget) -> Count:
        """The budget and special tokens; a bound where rows end in newlines."""
        if budget.is_full:
            return Count(grid.num_tokens)
        if grid.modality == "image":
            return count_by_plane(grid, budget.split([p.num_patches for p in grid.planes]))
        keep = max(1, budget.count(grid.num_patches))
        if keep == grid.num_patches:
            return Count(grid.num_tokens)
        newlines = 0
        if grid.planes[0].row_newline:
            T, H, W = grid.shape
            newlines = min(keep, self.num_rows(T, H * W, keep) * H)
        return Count(keep + grid.num_special + newlines, exact=newlines == 0)

    # -- projector ------------------------------------------------------------------------------

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Mix frames, join rows and merge patches of one item.

        Raises:
            MissingSignalError: nothing compares the frames of a video with the question.
            ValueError: the frames differ in size.
        """
        grid, budget = context.grid, context.budget
        if budget.is_full:
            return None
        if grid.modality == "image":
            return self._image(tokens, context)
        keep = max(1, budget.count(grid.num_patches))
        if keep == grid.num_patches:
            return None
        x_TLD = frames_of(tokens, grid, self.name)
        reduction = self._video(x_TLD, keep, context)
        context.note("merged patches", lambda: merged_groups(reduction), "label")
        return reduction

    def _image(self, tokens: Tokens, context: ProjectorContext) -> Reduction:
        grid = context.grid

        def merge(source_TL: torch.Tensor, num: int) -> Reduction:
            return condense(take_planes(tokens.x_BND[0], source_TL), num, self.order)

        kept = context.budget.split([plane.num_patches for plane in grid.planes])
        reduction = merge_by_plane(grid, kept, merge, tokens.device)
        context.note("merged patches", lambda: merged_groups(reduction), "label")
        return reduction

    def _video(self, x_TLD: torch.Tensor, keep: int, context: ProjectorContext) -> Reduction:
        T, L = x_TLD.shape[:2]
        frames = self._mix(self.num_rows(T, L, keep), context, x_TLD.device)
        y_KLD = frames.apply(x_TLD.flatten(1)[None])[0].unflatten(1, (L, -1))
        links_K = ops.duplicate_links(
            row_similarity(y_KLD, self.compare),
            self.threshold,
            most=len(y_KLD) - -(-keep // L),
        )
        joined = join_rows(links_K, self.chains)
        y_RLD = joined.apply(y_KLD.flatten(1)[None])[0].unflatten(1, (L, -1))
        rows = frames.then(joined)
        context.note(
            "rows", lambda: rows.groups_BN[0].repeat_interleave(L), "label", "frames mixed into one"
        )
        return self._spread(rows, y_RLD, keep, context.grid)

    def _mix(self, num_rows: int, context: ProjectorContext, device: torch.device) -> Reduction:
        """The frames of every row and their weights, as a merge of T frames into K rows."""
        score_T = context.signal("text.frame_similarity")[0].cpu().double()
        spread = score_T.std(correction=0).clamp(min=1e-6)
        logits_T = (score_T - score_T.mean()) / spread
        if self.noise:
            logits_T = logits_T + ops.gumbel_noise(logits_T, context.generator())
        row_T = row_windows(torch.softmax(logits_T / self.tau, 0), num_rows)
        is_seen_KT = row_T == torch.arange(num_rows)[:, None]
        selector_KT = soft_selector(logits_T.where(is_seen_KT, -torch.inf), self.tau)
        weight_T, best_K = selector_KT.sum(0), selector_KT.argmax(1)
        L = context.grid.planes[0].num_patches
        context.note("relevance", lambda: score_T.float().repeat_interleave(L))
        context.note(
            "selector", lambda: weight_T.repeat_interleave(L), caption="share of the row's mixture"
        )
        return Reduction.merge(
            row_T.to(device),
            num_rows,
            weight_T[None].to(device),
            best_K[None].to(device),
            normalise=False,
        )

    def _spread(self, rows: Reduction, y_RLD: torch.Tensor, keep: int, grid: Grid) -> Reduction:
        """Merge the patches of every row to its part, and say what every patch of the item feeds.

        Sums over frames and over patches are independent, so the weight of a patch is the product
        of its frame's and its place's.
        """
        R, L, _ = y_RLD.shape
        device = y_RLD.device
        place_RL = torch.empty(R, L, dtype=torch.long, device=device)
        share_RL = torch.ones(R, L, device=device)
        rank_RL = torch.zeros(R, L, dtype=torch.long, device=device)
        parts = ops.split_evenly(keep, R)
        first = 0
        for num in sorted(set(parts), reverse=True):
            some = slice(first, first + parts.count(num))
            merged = condense(y_RLD[some], num, self.order)
            place_RL[some] = merged.anchor_BM.gather(1, merged.groups_BN)
            if merged.weight_BN is not None:
                share_RL[some] = merged.weight_BN
            order_n = torch.arange(num, device=device).expand_as(merged.anchor_BM)
            rank_RL[some] = rank_RL[some].scatter(1, merged.anchor_BM, order_n)
            first = some.stop

        patch_TL = grid.patch_index(device).view(-1, L)
        row_T, weight_BN = rows.groups_BN[0], rows.weight_BN
        assert weight_BN is not None
        frame_T = rows.anchor_BM[0][row_T]  # of a row that was dropped: not used below
        home_TL = patch_TL[frame_T[:, None], place_RL[row_T]]
        home_N = torch.full((grid.num_tokens,), -1, device=device)
        weight_N = torch.ones(grid.num_tokens, device=device)
        rank_N = torch.zeros(grid.num_tokens, dtype=torch.long, device=device)
        home_N[patch_TL] = home_TL.where(row_T[:, None] >= 0, -1)
        weight_N[patch_TL] = weight_BN[0].float()[:, None] * share_RL[row_T]
        rank_N[patch_TL[rows.anchor_BM[0]]] = rank_RL
        return merge_by_anchor(grid, home_N, weight_N, rank_N)
