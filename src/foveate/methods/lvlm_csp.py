"""LVLM_CSP: few visual tokens in the first decoder layers, all in the next, few in the rest.

Legend: N visual tokens of a sample, K chosen tokens, O masks, H and W their pixels, h and w the
token grid, S tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import adaptive_avg_pool2d

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    DecoderContext,
    Method,
    Reduction,
    TokenKind,
    Tokens,
    relative_layer,
)

Choice = Literal["even", "uniform", "random", "cls", "seg_first"]
CHOICES = ("even", "uniform", "random", "cls", "seg_first")
Share = int | float


def strided(num_tokens: int, keep: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The paper's uniform chooser: `i * floor(N / K)` for i < K, int64 [K].

    Where K does not divide N, the tokens from `K * floor(N / K)` on are out of its reach.

    Example:
        >>> strided(7, 3).tolist(), strided(250, 64)[-1].item()
        ([0, 2, 4], 189)
    """
    return torch.arange(keep, device=device) * (num_tokens // max(keep, 1))


def instance_shares(sizes: Sequence[float], available: Sequence[int], keep: int) -> list[int]:
    """Tokens of every instance: `max(1, floor(keep * size / sum))`, trimmed to sum to <= `keep`.

    Instances without a token get none. What is too much goes from the largest count, of equal ones
    from the smallest instance.

    Args:
        sizes: area of every instance.
        available: tokens of every instance.
        keep: tokens in all.

    Example:
        >>> instance_shares([90, 9, 1], [50, 4, 1], 10), instance_shares([1, 1, 1], [5, 5, 5], 2)
        ([8, 1, 1], [0, 1, 1])

    Source: LVLM_CSP (arXiv 2504.10854), the seg-first chooser; trimming is ours.
    """
    total = sum(sizes) or 1
    counts = [
        min(have, max(1, int(keep * size / total)))
        for size, have in zip(sizes, available, strict=True)
    ]
    for _ in range(sum(counts) - keep):
        most = max(range(len(counts)), key=lambda i: (counts[i], -sizes[i]))
        counts[most] -= 1
    return counts


@dataclass(frozen=True)
class LVLMCSP(Method):
    """LVLM_CSP: clustering, scattering and pruning in three ranges of decoder layers.

    Before layer `scatter_layer` only `clusters` visual tokens take part, the others are parked;
    then all do; from layer `prune_layer` on only the `keep` tokens that the query token attends to
    most. `retain` is the mean share of visual tokens over the layers, see `counts`.

    Args:
        scatter_layer: the layer before which parked tokens return: an index or a fraction of the
            depth.
        prune_layer: the layer before which tokens go for good, likewise.
        clusters: tokens of the first range, a number or a fraction; None derives it from `retain`.
        keep: tokens of the last range, likewise.
        chooser: which tokens the first range has: "even" spacing over all of them; "uniform", the
            paper's stride (see `strided`); "random"; "cls", those that the encoder's [CLS] token
            attends to most; "seg_first", a share of every mask.
        masks: for "seg_first", bool masks of instances of the sample's one image [O][H][W] (nested
            lists, array or tensor), which may overlap; pixels in none are one more instance.
        query: the token whose attention prunes, counted back from the end of the prompt: the last
            token is -1. Name the place of [SEG] where the prompt holds it.

    Raises:
        ValueError: a value is out of range, or masks and chooser do not fit.

    Example:
        >>> from foveate.core import Budget
        >>> LVLMCSP().schedule(256, 32, Budget(retain=0.34375))[::6]
        [64, 64, 256, 64, 64, 64]

    Source: arXiv 2504.10854 (clustering, scattering, pruning); ranges and counts are ours.
    """

    scatter_layer: int | float = 12 / 32
    prune_layer: int | float = 16 / 32
    clusters: Share | None = None
    keep: Share | None = None
    chooser: Choice = "even"
    masks: tuple[tuple[tuple[bool, ...], ...], ...] | None = None
    query: int = -1

    card: ClassVar[Card] = Card(
        name="lvlm_csp",
        title="LVLM_CSP",
        paper="LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and "
        "Pruning for Reasoning Segmentation",
        arxiv="2504.10854",
        year=2025,
        stages=("decoder",),
        kind="training-free",
        summary="Lets a few visual tokens pass the first decoder layers, all of them the next, and "
        "the attended ones the rest.",
        defaults={
            "any, 32 layers, 256 tokens (ours; the paper's own are not public)": "scatter before "
            "layer 12, prune before layer 16, 64 tokens in the outer ranges: 88 per layer, 34.4 %",
        },
        headline=(
            "65 % fewer FLOPs on image tokens with virtually no loss; 70 % with a loss of about "
            "1 % on a 7B model (abstract)",
        ),
        notes=(
            "There is no public code: layers, counts and which attention prunes (the last "
            "scattering layer, mean over heads) are ours.",
            "`retain` is the mean share of visual tokens over all layers. The outer ranges get "
            "equal shares of what scattering leaves of it; scattering ends early where it would "
            "take more than half, but lasts at least one layer, so a mean share below one over "
            "the number of layers is out of reach.",
            "Parked tokens take part in neither attention nor MLP and come back as they left. "
            "Every token keeps its position.",
            "'even' is the paper's uniform choice wherever the count divides the number of "
            "tokens; elsewhere the paper's stride ('uniform') never reaches the end of the image.",
            "Without `query` the last token of the prompt prunes, as [SEG] does where the answer "
            "is given.",
            "'cls' reads the mean over heads of the block that makes the features, and needs an "
            "encoder with [CLS].",
            "'seg_first' takes masks that the caller has made; a token belongs to the mask that "
            "covers most of it, tokens of an instance are spaced evenly, and what rounding leaves "
            "is filled from the background.",
            "Deepstack features that layers of the first range add (Qwen3-VL) reach the chosen "
            "tokens only.",
        ),
        positions="original",
        retain=11 / 32,
    )

    def __post_init__(self) -> None:
        for name in ("clusters", "keep"):
            value = getattr(self, name)
            if value is not None and not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
                raise ValueError(
                    f"{name} is a number of tokens >= 1, a fraction in (0, 1] or None, got "
                    f"{value!r}."
                )
        if self.chooser not in CHOICES:
            raise ValueError(f"chooser must be one of {', '.join(CHOICES)}, got {self.chooser!r}.")
        if self.query >= 0:
            raise ValueError(
                f"query counts back from the end of the prompt, so it is -1 or less, got "
                f"{self.query}."
            )
        if (self.masks is not None) != (self.chooser == "seg_first"):
            raise ValueError(
                "masks and chooser='seg_first' go together: give both or none (masks are "
                f"{'not ' if self.masks is None else ''}given, chooser is {self.chooser!r})."
            )
        if self.masks is not None:
            object.__setattr__(self, "masks", _nested(self.masks))
        if self.chooser == "cls":
            object.__setattr__(self, "needs", ("encoder.cls_attention",))

    # -- how many -------------------------------------------------------------------------------

    def layers(self, num_layers: int) -> tuple[int, int]:
        """The layers before which tokens return and before which they go.

        Raises:
            ValueError: a layer does not exist, the ranges are empty, or there are fewer than three
                layers.
        """
        if num_layers < 3:
            raise ValueError(f"lvlm_csp needs three ranges of decoder layers, got {num_layers}.")
        back = relative_layer(self.scatter_layer, num_layers, "scatter_layer")
        prune = relative_layer(self.prune_layer, num_layers, "prune_layer")
        # Fractions may meet in a shallow model; indices must be right.
        if 0 < self.scatter_layer < 1:
            back = min(max(back, 1), num_layers - 2)
        if 0 < self.prune_layer < 1:
            prune = max(prune, back + 1)
        if not 0 < back < prune < num_layers:
            raise ValueError(
                f"scatter_layer must be at least 1 and prune_layer greater, got layers {back} and "
                f"{prune} of {num_layers}."
            )
        return back, prune

    def counts(self, num_tokens: int, num_layers: int, budget: Budget) -> tuple[int, int, int]:
        """Tokens of the first range, tokens of the last, and the layer where the last begins.

        Of a mean share r over L layers, s scattering layers use s / L; (r L - s) / (L - s) is left
        for each of the others. A count that `clusters` or `keep` names is taken off beforehand.

        Example:
            >>> from foveate.core import Budget
            >>> LVLMCSP().counts(256, 32, Budget(retain=0.34375))
            (64, 64, 16)
            >>> LVLMCSP(clusters=64, keep=48).counts(256, 32, Budget(retain=0.1))
            (64, 48, 13)
        """
        back, prune = self.layers(num_layers)
        retain, most = budget.fraction(num_tokens), max(num_tokens, 1)
        scattering = min(prune - back, max(1, int(retain * num_layers / 2)))
        prune = back + scattering
        shares = [
            min(1.0, given / most) if isinstance(given, int) else given
            for given in (self.clusters, self.keep)
        ]
        ranges = (back, num_layers - prune)
        left = retain * num_layers - scattering
        left -= sum(share * span for share, span in zip(shares, ranges, strict=True) if share)
        open_layers = sum(span for share, span in zip(shares, ranges, strict=True) if not share)
        first, last = (
            max(1, round(most * min(1.0, max(0.0, left / open_layers) if share is None else share)))
            for share in shares
        )
        return first, last, prune

    def schedule(self, num_tokens: int, num_layers: int, budget: Budget) -> list[int]:
        """Visual tokens in every decoder layer."""
        if budget.is_full:
            return [num_tokens] * num_layers
        back, _ = self.layers(num_layers)
        first, last, prune = self.counts(num_tokens, num_layers, budget)
        return [first] * back + [num_tokens] * (prune - back) + [last] * (num_layers - prune)

    # -- where ----------------------------------------------------------------------------------

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """The first layer, and those before which a budget may prune."""
        back, prune = self.layers(num_layers)
        return (0, *range(back + 1, prune + 1))

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """The scattering layers: the last one of them prunes."""
        return tuple(range(*self.layers(num_layers)))

    def return_layers(self, num_layers: int) -> tuple[int, ...]:
        """The first scattering layer."""
        return (self.layers(num_layers)[0],)

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Park all but the chosen tokens before layer 0; keep the attended ones after scattering.

        Raises:
            ValueError: `query` lies outside the prompt or on a visual token, or the masks do not
                belong to the sample's visual tokens.
        """
        N = tokens.num_tokens
        if context.budget.is_full or N == 0:
            return None
        first, last, prune = self.counts(N, context.num_layers, context.budget)
        if context.layer == 0:
            chosen_K = self._choose(tokens, context, first)
            context.note("first to think", True, "mark", "the others are parked", at=chosen_K)
            return Reduction.select(chosen_K, N)
        if context.layer != prune:
            return None
        score_N = self._attention(context)
        context.note("attention", score_N, caption="of the query token, in the layer before")
        return Reduction.select(ops.top_k(score_N, last), N)

    def _attention(self, context: DecoderContext) -> torch.Tensor:
        """Attention of the query token to the visual tokens in the layer before, float32 [N]."""
        layer = context.layer - 1
        view = context.attention(layer)
        num_tokens = view.q_BHSd.shape[2]
        row = num_tokens + self.query
        if row < 0 or bool((view.visual_N == row).any()):
            raise ValueError(
                f"query = {self.query} names no text token of a prompt of {num_tokens} tokens."
            )
        row_S = view.rows(torch.tensor([row]))[0, :, 0].mean(0)
        return row_S[context.survivors(layer)[context.visual_N]]

    def _choose(self, tokens: Tokens, context: DecoderContext, keep: int) -> torch.Tensor:
        """The tokens of the first range, int64 [K], ascending."""
        N, device = tokens.num_tokens, tokens.device
        if self.chooser == "random":
            return ops.random_indices(1, N, keep, seed=context.seed, device=device)[0]
        if self.chooser == "uniform":
            return strided(N, keep, device)
        if self.chooser == "cls":
            score_N = context.carried("encoder.cls_attention")
            # Newline tokens have no score; they are chosen last.
            return ops.top_k(score_N.masked_fill(score_N.isnan(), -torch.inf), keep)
        if self.chooser == "seg_first":
            instance_N, sizes = self._instances(tokens)
            context.note("instances", instance_N, "label", "the last one is the background")
            return by_instance(instance_N, sizes, keep)
        return torch.arange(keep, device=device) * N // max(keep, 1)

    def _instances(self, tokens: Tokens) -> tuple[torch.Tensor, list[float]]:
        """The instance of every token, int64 [N], and all areas; the background comes last."""
        assert self.masks is not None and tokens.position_BN3 is not None
        position_N3 = tokens.position_BN3[0].long()
        kind_BN = tokens.kind_BN
        patch_N = torch.ones_like(position_N3[:, 0], dtype=torch.bool)
        if kind_BN is not None:
            patch_N = kind_BN[0] == TokenKind.PATCH
        place_P3 = position_N3[patch_N]
        if bool((place_P3[:, 0] > 0).any()) or len(place_P3.unique(dim=0)) < len(place_P3):
            raise ValueError(
                "seg_first takes the masks of one image; this sample holds several images, tiles "
                "or frames."
            )
        mask_OHW = torch.tensor(self.masks, dtype=torch.float32, device=tokens.device)
        h, w = (int(size) + 1 for size in place_P3[:, 1:].amax(0))
        cover_OP = adaptive_avg_pool2d(mask_OHW, (h, w))[:, place_P3[:, 1], place_P3[:, 2]]
        best_P = cover_OP.max(0)
        background = len(mask_OHW)
        instance_N = torch.full_like(position_N3[:, 0], background)
        instance_N[patch_N] = best_P.indices.where(best_P.values > 0, background)
        nowhere = 1 - mask_OHW.amax(0)
        return instance_N, [*mask_OHW.sum((1, 2)).tolist(), float(nowhere.sum())]


def by_instance(instance_N: torch.Tensor, sizes: Sequence[float], keep: int) -> torch.Tensor:
    """`keep` tokens, evenly spaced among those of every instance by `instance_shares`, ascending.

    What rounding leaves is spread over the rest of the last instance, the background, and then
    over all that remain. O(N log N) for each of the few instances.
    """
    device = instance_N.device
    members = [(instance_N == i).nonzero()[:, 0] for i in range(len(sizes))]
    counts = instance_shares(sizes, [len(member) for member in members], keep)
    chosen_N = torch.zeros_like(instance_N, dtype=torch.bool)
    for member, count in zip(members, counts, strict=True):
        chosen_N[member[ops.uniform_indices(len(member), count, device, endpoints=False)]] = True
    for candidate_N in (instance_N == len(sizes) - 1, torch.ones_like(chosen_N)):
        free = (candidate_N & ~chosen_N).nonzero()[:, 0]
        more = min(keep - int(chosen_N.sum()), len(free))
        chosen_N[free[ops.uniform_indices(len(free), more, device, endpoints=False)]] = True
    return chosen_N.nonzero()[:, 0]


def _nested(masks: object) -> tuple[tuple[tuple[bool, ...], ...], ...]:
    """Masks as plain tuples, by which recipes compare and are written down."""
    try:
        table = torch.as_tensor(masks)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError("masks must be [O][H][W] with equal rows and equal masks.") from error
    if table.dim() != 3 or 0 in table.shape:
        raise ValueError(f"masks must be [O][H][W], got shape {tuple(table.shape)}.")
    return tuple(tuple(tuple(row) for row in mask) for mask in (table != 0).tolist())
