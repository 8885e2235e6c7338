"""QuoTA: every frame gets a share of the tokens by how well it answers the question.

Legend: F frames of a clip, K frames that are shown, T frames (planes) of an item, L patches of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    FramePlan,
    FramesContext,
    Grid,
    Method,
    NewlinePolicy,
    ProjectorContext,
    Reduction,
    Tokens,
    frames_of,
)
from foveate.methods._frame_sizes import Version, resample_frames
from foveate.methods._query import decouple_query

__all__ = ["QuoTA", "capped_weights", "decouple_query", "frame_weights", "token_counts"]


def unit_interval(score_T: torch.Tensor) -> torch.Tensor:
    """Cosines as shares of the way from the least to the most relevant frame, in [0, 1]; 1 each
    where all are equal.

    Example:
        >>> unit_interval(torch.tensor([0.2, 0.3, 0.25])).tolist()[:2]
        [0.0, 1.0]
    """
    low, high = score_T.min(), score_T.max()
    return (score_T - low) / (high - low) if high > low else torch.ones_like(score_T)


def frame_weights(probability_T: torch.Tensor, exponent: float = 2.0) -> torch.Tensor:
    """The share of the tokens that every frame gets, float64 [T] on the CPU, adding up to 1.

    All frames share alike where every probability is 0.

    Example:
        >>> frame_weights(torch.tensor([0.5, 0.25, 0.25])).tolist()
        [0.6666666666666666, 0.16666666666666666, 0.16666666666666666]

    Source: QuoTA (arXiv 2503.08689); the even share is ours.
    """
    # The factor cancels; it is there so that rounding is that of the published numbers.
    weight_T = (100 * probability_T.detach().cpu().double()) ** exponent
    total = weight_T.sum()
    if not total > 0:
        return torch.full_like(weight_T, 1 / len(weight_T))
    return weight_T / total


def capped_weights(weight_T: torch.Tensor, most: float) -> torch.Tensor:
    """Shares of at most `most`; what frames have too much goes to those below, once.

    In the order of frames, each by its share of the present sum, capped frames included; what one
    then has too much in turn only reaches the frames after it, and the rest is lost. O(T).

    Example:
        >>> capped_weights(torch.tensor([0.75, 0.125, 0.125]).double(), 0.5).tolist()[0]
        0.5

    Source: the released code of QuoTA.
    """
    excess = float((weight_T - most).clamp(min=0).sum())
    shares = weight_T.clamp(max=most).tolist()
    total = sum(shares)
    if excess <= 0 or total <= 0:
        return weight_T.clamp(max=most)
    for frame, share in enumerate(shares):
        if share < most:
            given = excess * share / total
            total += given
            excess += max(0.0, share + given - most)
            shares[frame] = min(share + given, most)
    return torch.tensor(shares, dtype=weight_T.dtype)


def token_counts(weight_T: torch.Tensor, budget: int) -> list[int]:
    """Tokens per frame, the floor of its share; the best frame gets all where nobody has one.

    Example:
        >>> token_counts(frame_weights(torch.tensor([0.9, 0.3, 0.0])), 25)
        [22, 2, 0]
    """
    count_T = (budget * weight_T).floor().long()
    if not int(count_T.sum()):
        count_T[weight_T.argmax()] = max(1, budget)
    return count_T.tolist()


@dataclass(frozen=True)
class QuoTA(Method):
    """QuoTA: dynamic frame sampling, and tokens by the square of every frame's relevance.

    The frames stage looks at more frames than there is room for and has each scored; the projector
    stage resamples each to its share of the budget. Videos only; images pass untouched.
    O(T) beside the scorer's forward calls, which dominate.

    Args:
        version: resampling of a frame: "v1" bilinear (a frame may grow), "v2" adaptive average
            pooling, "v3" evenly spaced patches, "v4" bipartite matching, "v5" the same along rows
            and columns.
        exponent: of the probability in a frame's share; larger is sharper.
        base: frames looked at, as a multiple of those that the model is shown without a recipe.
        per_hour: more of them per hour of the clip, in the same unit.
        force: look at that many frames even where fewer lie a second apart.
        newlines: of models whose rows end in newlines: "row" gives every new row one, "end" keeps
            those behind the last frame, "remove" none.

    Raises:
        ValueError: a value is unknown or out of range.

    Example:
        >>> QuoTA().count(Grid.video(24, 14, 14), Budget(tokens=588))
        Count(tokens=588, exact=False)

    Source: arXiv 2503.08689.
    """

    version: Version = "v1"
    exponent: float = 2.0
    base: float = 1.5
    per_hour: float = 1.0
    force: bool = False
    newlines: NewlinePolicy = "row"

    card: ClassVar[Card] = Card(
        name="quota",
        title="QuoTA",
        paper="QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video "
        "Comprehension",
        arxiv="2503.08689",
        year=2025,
        url="https://github.com/MAC-AutoML/QuoTA",
        stages=("frames", "projector"),
        kind="training-free",
        summary="Scores how well each frame answers the question and resamples it to its share of "
        "a fixed number of tokens.",
        defaults={
            "LLaVA-Video-7B": "96 frames and 64 more per hour; 64 x 196 = 12544 tokens; bilinear "
            "resampling; shares by the square of the yes-probability of Qwen2-VL-2B",
        },
        headline=(
            "+3.2 % on average over six benchmarks (Video-MME and MLVU among them) with "
            "LLaVA-Video-7B at the budget of 64 frames of 196 tokens (abstract)",
        ),
        notes=(
            "Frame numbers are published for 64 frames: 96 and 64 per hour are 1.5 and 1.0 times "
            "the frames asked for. Where fewer frames lie a second apart these are taken, but "
            "never fewer than asked for.",
            "With frames chosen by foveate.choose_frames or ask, retain is the fraction of the "
            "tokens of the frames asked for, not of the more that are looked at; without a budget "
            "it is all of them. Newlines come on top.",
            "Scores are the scorer's: foveate.AskingScorer is the published yes-probability, with "
            "or without query decoupling (decouple_query). Cosines of a CLIP-like scorer, and the "
            "signal text.frame_similarity where no frames were chosen, are stretched so that the "
            "least relevant frame of the video has 0 and the most relevant 1.",
            "All-zero scores share the tokens evenly, which the released code does not guard "
            "against; where the budget has no token for any frame, the best one gets it.",
            "Frames are resampled from the tokens that the model has behind its own pooling, in "
            "the published code from 27 x 27 before it. Grids follow the frame's proportions.",
            "The released times of frames a second apart are divided by the frame stride once too "
            "often; ours are those of the container. The prompt's line of times is the caller's: "
            "all frames of Frames.seconds, those without tokens too.",
        ),
        retain=2 / 3,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("text.frame_similarity",)

    def __post_init__(self) -> None:
        if self.version not in get_args(Version):
            raise ValueError(f'version must be "v1" to "v5", got {self.version!r}.')
        if self.newlines not in get_args(NewlinePolicy):
            raise ValueError(
                f'newlines must be "row", "keep", "end" or "remove", got {self.newlines!r}.'
            )
        if not self.exponent > 0 or not self.base > 0 or self.per_hour < 0:
            raise ValueError(
                f"exponent and base must be above 0 and per_hour at least 0, got {self.exponent}, "
                f"{self.base} and {self.per_hour}."
            )

    # -- frames ---------------------------------------------------------------------------------

    def num_frames(self, frames: int, duration: float) -> int:
        """Frames that are looked at, of a clip of so many seconds.

        Example:
            >>> QuoTA().num_frames(64, 0.0), QuoTA().num_frames(64, 5400.0)
            (96, 192)
        """
        return max(1, int(self.base * frames) + int(duration / 3600 * self.per_hour * frames))

    def frames(self, context: FramesContext) -> FramePlan:
        """Sample by length, score, and share out the tokens.

        Raises:
            MissingSignalError: there is no scorer.
        """
        index_K = context.evenly(self.num_frames(context.frames, context.duration))
        by_second_K = context.at_rate(1.0)
        if not self.force and len(by_second_K) < len(index_K):
            few = len(by_second_K) < context.frames
            index_K = context.evenly(context.frames) if few else by_second_K
        score_K = context.scores(index_K).cpu()
        if not context.probabilities:
            score_K = unit_interval(score_K)
        if not context.acts("projector"):
            best_K = ops.top_k(score_K, min(context.num_frames, len(index_K)))
            return FramePlan(index_K[best_K], score_K=score_K[best_K])
        weight_K = frame_weights(score_K, self.exponent)
        room = float(min(context.frames, len(index_K)))
        return FramePlan(index_K, weight_K=weight_K, score_K=score_K, room=room)

    # -- projector ------------------------------------------------------------------------------

    def budget_of(self, grid: Grid, budget: Budget, plan: FramePlan | None = None) -> int:
        """Tokens that the frames of a video share, newlines apart."""
        if plan is None or plan.room is None:
            return max(1, budget.count(grid.num_patches))
        room = round(plan.room * grid.num_patches / len(grid.planes))
        return room if budget.published else max(1, budget.count(room))

    def count(self, grid: Grid, budget: Budget) -> Count:
        """At most the budget and a newline for every row that it can have."""
        if grid.modality == "image" or budget.is_full:
            return Count(grid.num_tokens)
        keep, rows = self.budget_of(grid, budget), 0
        if grid.planes[0].row_newline and self.newlines in ("row", "keep"):
            T, H, W = grid.shape
            rows = min(keep, T + math.ceil(math.sqrt(T * keep * H / W)))
        return Count(keep + rows + grid.newlines_at_end, exact=False)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Resample every frame to its share.

        Raises:
            ValueError: the frames differ in size.
        """
        grid, plan = context.grid, context.plan
        if grid.modality == "image" or context.budget.is_full:
            return None
        x_TLD = frames_of(tokens, grid, self.name)
        L = x_TLD.shape[1]
        if plan is not None and plan.weight_K is not None:
            weight_T = plan.weight_K.double()
        else:
            score_T = context.signal("text.frame_similarity")[0].float()
            weight_T = frame_weights(unit_interval(score_T), self.exponent)
        keep = self.budget_of(grid, context.budget, plan)
        if self.version != "v1":
            weight_T = capped_weights(weight_T, L / keep)
        count_T = token_counts(weight_T, keep)
        if self.version != "v1":
            count_T = [min(n, L) for n in count_T]
        context.note("share of the tokens", lambda: weight_T.float().repeat_interleave(L))
        context.note(
            "tokens of the frame", lambda: torch.tensor(count_T).float().repeat_interleave(L)
        )
        return resample_frames(tokens, x_TLD, grid, count_T, self.version, self.newlines)
