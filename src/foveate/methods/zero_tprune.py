"""Zero-TPrune: rank the patches of a vision transformer by votes along its attention graph.

Legend: B images, H heads, M tokens present (prefix included), P patches among them, d head
channels, C channels of the features that are compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch
from torch.nn.functional import normalize, pad

from foveate import ops
from foveate.core import Budget, Card, EncoderContext, Method, Reduction, Tokens, blocks_run
from foveate.core.units import select_tokens

Feature = Literal["keys", "queries", "values", "hidden"]
Partition = Literal["unimportant", "important", "alternate", "all"]

#: Bytes of attention matrices that are held at once.
_BYTES = 2**28
#: Bytes of attention that may wait for the end of their block.
_KEPT_BYTES = 2**26
#: Numbers of attention that are voted along in one go on a CPU, whose second-level cache they fit.
_CACHED = 5 * 2**16
#: Votes have settled when none changes by more, of a mean of 1; looked at every so many rounds.
_SETTLED, _LOOK = 1e-6, 4
#: What a product may miss a whole number by and still be that number.
_HAIR = 1e-9


def votes(
    attention_BHMM: torch.Tensor,
    rounds: int,
    low: float = 0.01,
    high: float = 0.7,
    alive_BM: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of tokens by weighted page rank, and the heads that had a say.

    All tokens begin with the same weight and vote with it for those they attend to, `rounds` times
    or until nothing changes; heads whose importances vary too little or too much over the tokens
    are left out, and the rest is joined as a root mean square. O(rounds H M^2).

    Args:
        attention_BHMM: attention, rows adding up to 1, [B, H, M, M].
        rounds: of voting.
        low: least variance of a head's importances, which are scaled to a mean of 1.
        high: largest; where no head lies between the two, all count.
        alive_BM: tokens that take part: the attention among them is scaled to rows of 1 again;
            None: all.

    Returns:
        Importance float32 [B, M], zero for tokens that take no part, and which heads count, bool
        [B, H].

    Example:
        >>> attention = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]])
        >>> votes(attention[None, None], 1)[0].tolist()
        [[0.25, 0.5, 0.25]]

    Source: Zero-TPrune, section 3.2 (arXiv 2305.17328).
    """
    B, H, M, _ = attention_BHMM.shape
    weight_BM = attention_BHMM.new_ones(B, M) if alive_BM is None else alive_BM.to(attention_BHMM)
    num_B11 = weight_BM.sum(1)[:, None, None]
    few = max(1, _CACHED // max(M * M, 1)) if attention_BHMM.device.type == "cpu" else B * H
    mask_XM = None if alive_BM is None else weight_BM.repeat_interleave(H, 0)
    parts = zip(
        attention_BHMM.flatten(0, 1).split(few),
        (weight_BM / num_B11[..., 0]).repeat_interleave(H, 0).split(few),
        itertools.repeat(None) if mask_XM is None else mask_XM.split(few),
        strict=False,
    )
    score_BHM = torch.cat([_walk(*part, rounds) for part in parts]).view(B, H, M)
    scaled_BHM = (score_BHM * num_B11 - 1) * weight_BM[:, None]
    variance_BH = scaled_BHM.square().sum(2) / num_B11[..., 0]
    heads_BH = (variance_BH >= low) & (variance_BH <= high)
    heads_BH = heads_BH | ~heads_BH.any(1, keepdim=True)
    total_BM = (score_BHM.square() * heads_BH[..., None]).sum(1)
    return (total_BM / heads_BH.sum(1, keepdim=True)).sqrt(), heads_BH


def _walk(
    attention_XMM: torch.Tensor, start_XM: torch.Tensor, mask_XM: torch.Tensor | None, rounds: int
) -> torch.Tensor:
    """Where the votes of some heads are after so many rounds, [X, M]."""
    start_X1M, share_X1M = start_XM[:, None], None
    vote_X1M = score_X1M = start_X1M
    if mask_XM is not None:
        # A row times a matrix is twice as fast as a matrix times a column.
        total_X1M = torch.bmm(mask_XM[:, None], attention_XMM.transpose(1, 2))
        # Dividing each vote by what its row has left is the same as scaling the rows.
        share_X1M = mask_XM[:, None] / total_X1M.clamp_min(torch.finfo(torch.float32).tiny)
        vote_X1M = start_X1M * share_X1M
    settled = _SETTLED * start_X1M.amax(2, keepdim=True)
    for done in range(1, rounds + 1):
        before_X1M, score_X1M = score_X1M, torch.bmm(vote_X1M, attention_XMM)
        vote_X1M = score_X1M if share_X1M is None else score_X1M * share_X1M
        if done % _LOOK == 0:
            moved_X1M = (score_X1M - before_X1M).abs()
            if mask_XM is not None:
                moved_X1M = moved_X1M * mask_XM[:, None]
            if bool((moved_X1M < settled).all()):
                break
    return score_X1M[:, 0] if mask_XM is None else score_X1M[:, 0] * mask_XM


@lru_cache
def prune_schedule(
    num_patches: int, keep: int, ratios: tuple[float, ...], similar: float
) -> tuple[tuple[int, int], ...]:
    """Patches left after the two steps of every pruning layer, so that `keep` leave the last one.

    The published schedule with all its removals made smaller or larger by one factor.

    Args:
        num_patches: of an image, before the first.
        keep: how many are wanted.
        ratios: fraction that the second step of each layer keeps.
        similar: fraction of `num_patches` that the first step of each removes.

    Example:
        >>> prune_schedule(196, 67, (1, 0.9, 0.8, 0.7, 1), 10 / 196)
        ((186, 186), (176, 159), (149, 120), (110, 77), (67, 67))
    """

    def run(factor: float, least: int = keep) -> list[tuple[int, int]]:
        left, counts = num_patches, []
        for ratio in ratios:
            first = max(least, left - round(factor * similar * num_patches))
            share = max(0.0, 1 - factor * (1 - ratio))
            left = max(least, math.ceil(share * first - _HAIR))
            counts.append((first, left))
        return counts

    low, high = 0.0, 1.0
    while run(high)[-1][1] > keep:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if run(middle)[-1][1] <= keep else (middle, high)
    # The published factor, where it serves: what is rounded hides a range of them.
    return tuple(run(1.0 if run(1.0, 0)[-1][1] == keep else high))


@dataclass(frozen=True)
class ZeroTPrune(Method):
    """Zero-TPrune: after some blocks, drop near copies of important patches, then the unimportant.

    Each of the pruning layers votes once, removes the least important half's patches that are most
    like one of the other half, votes again among the rest, and keeps the most important. The budget
    makes all removals smaller or larger by one factor; `retain` = 67 / 196 is the published table
    on 196 patches.

    Args:
        after: blocks that have run before each pruning layer: a number, or a fraction of the depth.
        ratios: fraction of the patches that the second step of each keeps at the published budget.
        rounds: of voting in each.
        similar: fraction of an image's patches that the first step of each removes there; 0 leaves
            that step out.
        feature: what likeness is measured on: "keys", "queries", "values" (means over the heads),
            or "hidden", the output of the block.
        metric: "cosine", "dot", or the p of a Minkowski distance (1, 2, ..., inf).
        partition: who is removed for being like whom: "unimportant" patches for the important half,
            the reverse ("important"), every second for the others ("alternate"), or any ("all").
        low: variance of a head's importances below which it has no say.
        high: variance above which it has none.

    Raises:
        ValueError: a value is out of range, or the three lists differ in length.

    Example:
        >>> from foveate.core import Budget
        >>> [left for _, left in ZeroTPrune().schedule(196, Budget(retain=0.5))]
        [189, 170, 140, 105, 98]

    Source: arXiv 2305.17328; no code was published.
    """

    after: tuple[int | float, ...] = (1 / 12, 1 / 4, 1 / 2, 3 / 4, 11 / 12)
    ratios: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 1.0)
    rounds: tuple[int, ...] = (30, 5, 5, 1, 1)
    similar: float = 10 / 196
    feature: Feature = "keys"
    metric: Literal["cosine", "dot"] | float = "cosine"
    partition: Partition = "unimportant"
    low: float = 0.01
    high: float = 0.7

    card: ClassVar[Card] = Card(
        name="zero_tprune",
        title="Zero-TPrune",
        paper="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in "
        "Pre-Trained Transformers",
        arxiv="2305.17328",
        year=2024,
        url="https://jha-lab.github.io/zerotprune/",
        stages=("encoder",),
        kind="training-free",
        summary="Ranks patches by page rank on the attention graph and drops those that are "
        "unimportant or like an important one.",
        defaults={
            "DeiT-S at 224": "after blocks 1, 3, 6, 9, 11: ratios 1, .9, .8, .7, 1; rounds 30, 5, "
            "5, 1, 1; 10 similar patches each",
        },
        headline=(
            "ImageNet-1k top-1, GFLOPs and images/s of DeiT-S: 79.8 at 4.55 and 1506 to 79.4 at "
            "2.97 and 2188 (ToMe: 78.9 at 2.95 and 2264)",
            "At 3.08 GFLOPs: random 76.8, votes 78.6, with heads joined and filtered 78.9, with "
            "similarity 79.4",
        ),
        notes=(
            "No code was published; the schedule is not verified against the paper, its token "
            "counts fit the published GFLOPs.",
            "Ours: variances are those of importances scaled to a mean of 1; rows of the attention "
            "are scaled to 1 again after the first step; counts are rounded up.",
            "Prefix tokens ([CLS], registers) vote, are never pruned and do not count.",
            "Voting ends early where nothing changes any more.",
            "Inside a vision-language model the projector finds every dropped patch in the state "
            "in which it left.",
        ),
        retain=67 / 196,
    )
    encoder_drops: ClassVar[bool] = True
    encoder_point: ClassVar = "block_end"
    reads_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("after", "ratios", "rounds"):  # JSON has no tuples.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.after or not len(self.after) == len(self.ratios) == len(self.rounds):
            raise ValueError(
                "after, ratios and rounds need one entry per pruning layer, got "
                f"{len(self.after)}, {len(self.ratios)} and {len(self.rounds)}."
            )
        if any(value <= 0 for value in self.after) or list(self.after) != sorted(self.after):
            raise ValueError(f"after must be ascending and above 0, got {self.after}.")
        if not all(0 < ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios must lie in (0, 1], got {self.ratios}.")
        if not all(isinstance(number, int) and number >= 1 for number in self.rounds):
            raise ValueError(f"rounds must be whole numbers >= 1, got {self.rounds}.")
        if not 0 <= self.similar < 1:
            raise ValueError(f"similar must lie in [0, 1), got {self.similar}.")
        if self.similar == 0 and all(ratio == 1 for ratio in self.ratios):
            raise ValueError("Nothing would be pruned: similar is 0 and all ratios are 1.")
        for name, options in (("feature", Feature), ("partition", Partition)):
            if getattr(self, name) not in get_args(options):
                choices = ", ".join(map(repr, get_args(options)))
                raise ValueError(f"{name} must be {choices}, got {getattr(self, name)!r}.")
        if isinstance(self.metric, str):
            if self.metric not in ("cosine", "dot"):
                raise ValueError(f'metric must be "cosine", "dot" or a p, got {self.metric!r}.')
        elif not self.metric >= 1:
            raise ValueError(f"the p of a metric must be at least 1, got {self.metric}.")
        if not 0 <= self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}.")

    def blocks(self, num_layers: int) -> tuple[int, ...]:
        """The 0-based block behind which each pruning layer acts; several may share one.

        Raises:
            ValueError: the encoder has fewer blocks.

        Example:
            >>> ZeroTPrune().blocks(12), ZeroTPrune().blocks(4)
            ((0, 2, 5, 8, 10), (0, 0, 1, 2, 3))
        """
        found = []
        for value in self.after:
            number = blocks_run(value, num_layers)
            if number > num_layers:
                raise ValueError(f"after = {value}: this encoder has {num_layers} blocks.")
            found.append(number - 1)
        return tuple(found)

    def schedule(self, num_patches: int, budget: Budget) -> tuple[tuple[int, int], ...]:
        """Patches left behind the two steps of every pruning layer."""
        if budget.is_full:
            return ((num_patches, num_patches),) * len(self.after)
        keep = max(1, budget.count(num_patches))
        return prune_schedule(num_patches, keep, self.ratios, self.similar)

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when a pruning layer lies behind the last block."""
        if num_encoder_layers is not None:
            self.blocks(num_encoder_layers)

    def encoder_attention(self, context: EncoderContext) -> torch.Tensor | None:
        """Attention of a block behind which patches are pruned, made once for both. O(H M^2 d)."""
        q_BHMd, k_BHMd = context.queries_BHNd, context.keys_BHNd
        v_BHMd, size_BM = context.values_BHNd, context.size_BN
        acts = context.layer in self.blocks(context.num_layers) and not context.budget.is_full
        if not (acts and context.in_place) or q_BHMd is None or k_BHMd is None or v_BHMd is None:
            return None
        B, H, M, _ = q_BHMd.shape
        if 4 * B * H * M * M > _KEPT_BYTES:
            return None
        bias = None if size_BM is None else size_BM[:, None, None].log()
        attention = ops.attention_matrix(q_BHMd, k_BHMd, bias)
        context.state["attention"] = attention
        return attention.to(v_BHMd.dtype) @ v_BHMd

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Prune behind one block, image by image; attention of at most 256 MiB at a time."""
        prefix, (B, M) = context.num_prefix, tokens.x_BND.shape[:2]
        acting = [i for i, at in enumerate(self.blocks(context.num_layers)) if at == context.layer]
        if context.layer == 0:
            context.state["patches"] = M - prefix
        if not acting or context.budget.is_full:
            return None
        q_BHMd, k_BHMd = context.queries_BHNd, context.keys_BHNd
        if q_BHMd is None or k_BHMd is None:
            raise ValueError(
                "zero_tprune reads queries and keys of the block that has just run; another "
                "method has changed the sequence inside it."
            )
        feature_BMC = self._features(tokens, context)
        P = context.state.setdefault("patches", M - prefix)
        counts = self.schedule(P, context.budget)
        mask_BM = tokens.mask_BN
        if mask_BM is None:
            mask_BM = torch.ones(B, M, dtype=torch.bool, device=tokens.device)
        # Images that entered with fewer patches lose in proportion.
        share_B = context.state.get("share")
        if share_B is None:
            share_B = context.state["share"] = mask_BM[:, prefix:].sum(1) / P
        keep, score = [], []
        for part, attention in self._attention(context, q_BHMd, k_BHMd):
            alive, importance = mask_BM[part], None
            for i in acting:
                few_b2 = (
                    torch.tensor(counts[i], device=tokens.device) * share_B[part, None]
                ).ceil()
                alive, importance = self._prune(
                    attention, feature_BMC[part], alive, few_b2.long(), self.rounds[i], prefix
                )
            keep.append(alive)
            score.append(importance)
        score_BM = torch.cat(score)
        context.note("importance", lambda: pad(score_BM[:, prefix:], (prefix, 0), value=torch.nan))
        return select_tokens(torch.cat(keep))

    @staticmethod
    def _attention(
        context: EncoderContext, q_BHMd: torch.Tensor, k_BHMd: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The attention of some images at a time, and which they are."""
        B, H, M, _ = q_BHMd.shape
        known = context.state.pop("attention", None)
        if known is not None and known.shape == (B, H, M, M):
            yield slice(0, B), known
            return
        step = min(B, max(1, _BYTES // max(H * M * M * 4, 1)))
        dtype = torch.promote_types(q_BHMd.dtype, torch.float32)
        room = torch.empty(step, H, M, M, dtype=dtype, device=q_BHMd.device)
        size_BM = context.size_BN
        for first in range(0, B, step):
            part = slice(first, min(first + step, B))
            bias = None if size_BM is None else size_BM[part, None, None].log()
            q, k = q_BHMd[part], k_BHMd[part]
            yield part, ops.attention_matrix(q, k, bias, out=room[: len(q)])

    def _prune(
        self,
        attention_BHMM: torch.Tensor,
        feature_BMC: torch.Tensor,
        alive_BM: torch.Tensor,
        count_B2: torch.Tensor,
        rounds: int,
        prefix: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pruning layer: who is left, bool [B, M], and the importance of those it asked."""
        mask_BM = None if bool(alive_BM.all()) else alive_BM
        vote_BM, _ = votes(attention_BHMM, 1, self.low, self.high, mask_BM)
        keep_BP = alive_BM[:, prefix:]
        drop_B = (keep_BP.sum(1) - count_B2[:, 0]).clamp_min(0)
        if bool((drop_B > 0).any()):
            gone_BP = self.similar_patches(
                feature_BMC[:, prefix:], vote_BM[:, prefix:], keep_BP, drop_B
            )
            keep_BP = keep_BP & ~gone_BP
            alive_BM = torch.cat([alive_BM[:, :prefix], keep_BP], dim=1)
        score_BM, _ = votes(attention_BHMM, rounds, self.low, self.high, alive_BM)
        keep_BP = _best(score_BM[:, prefix:], count_B2[:, 1], keep_BP)
        return torch.cat([alive_BM[:, :prefix], keep_BP], dim=1), score_BM

    def similar_patches(
        self,
        feature_BPC: torch.Tensor,
        vote_BP: torch.Tensor,
        alive_BP: torch.Tensor,
        drop_B: torch.Tensor,
    ) -> torch.Tensor:
        """The patches that the first step removes, bool [B, P]. O(P^2 C).

        Args:
            feature_BPC: what is compared.
            vote_BP: importance after one round.
            alive_BP: which patches there are.
            drop_B: how many to remove, at most as many as may be.
        """
        important_BP = _best(vote_BP, (alive_BP.sum(1) + 1) // 2, alive_BP)
        order_BP = alive_BP.long().cumsum(1) - 1
        candidate_BP, reference_BP = {
            "unimportant": (alive_BP & ~important_BP, important_BP),
            "important": (important_BP, alive_BP & ~important_BP),
            "alternate": (alive_BP & (order_BP % 2 == 0), alive_BP & (order_BP % 2 == 1)),
            "all": (alive_BP, alive_BP),
        }[self.partition]
        alike_BPP = _likeness(feature_BPC.float(), self.metric)
        alike_BPP.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        best_BP = alike_BPP.masked_fill(~reference_BP[:, None], -torch.inf).amax(2)
        candidate_BP = candidate_BP & (best_BP > -torch.inf)
        return _best(best_BP, drop_B, candidate_BP)

    def _features(self, tokens: Tokens, context: EncoderContext) -> torch.Tensor:
        if self.feature == "hidden":
            return tokens.x_BND
        heads_BHMd = getattr(context, f"{self.feature}_BHNd")
        assert heads_BHMd is not None
        return heads_BHMd.mean(1)


def _likeness(feature_BPC: torch.Tensor, metric: str | float) -> torch.Tensor:
    """How alike patches are, [B, P, P], larger is more."""
    if isinstance(metric, str):
        unit_BPC = normalize(feature_BPC, dim=-1) if metric == "cosine" else feature_BPC
        return unit_BPC @ unit_BPC.transpose(1, 2)
    return -torch.cdist(feature_BPC, feature_BPC, p=metric)


def _best(score_BP: torch.Tensor, keep_B: torch.Tensor, mask_BP: torch.Tensor) -> torch.Tensor:
    """The best `keep_B` of every image among those of the mask, bool [B, P]."""
    num_B = torch.minimum(keep_B, mask_BP.sum(1))
    # All scores of the mask are finite, so that one sort does, where `ops.ranks` needs three.
    order_BP = score_BP.masked_fill(~mask_BP, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    first_BP = torch.arange(order_BP.shape[1], device=order_BP.device) < num_B[:, None]
    return torch.zeros_like(mask_BP).scatter_(1, order_BP, first_BP)
