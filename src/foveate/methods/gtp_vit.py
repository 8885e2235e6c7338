"""GTP-ViT: hand the features of unimportant patches on along a graph before they leave.

Legend: B images, H heads, N tokens present ([CLS] and other prefix tokens included), P patches of
an image, n patches present, K of them that stay, d head channels, C channels of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch.nn.functional import normalize, pad

from foveate import ops
from foveate.core import Budget, Card, EncoderContext, Method, Reduction, Tokens, spread

Graph = Literal["mixed", "spatial", "semantic"]
Score = Literal[
    "mixed_max", "mixed_mean", "cls_max", "cls_mean", "received_max", "received_mean",
    "diagonal_max", "diagonal_mean", "similarity", "random",
]  # fmt: skip

#: Bytes of attention matrices that are held at once.
_BYTES = 2**28
#: Patches that leave each of DeiT-B's 12 blocks (of 196 at first): fraction of the attention kept,
#: weight of what is handed on, as searched by the authors.
_PUBLISHED: dict[int, tuple[float, float]] = {
    1: (0.8, 0.1),
    2: (0.7, 0.1),
    3: (0.9, 0.4),
    4: (1.0, 0.4),
    5: (0.6, 0.15),
    6: (0.6, 0.15),
    7: (0.6, 0.1),
    8: (0.6, 0.1),
    9: (0.7, 0.2),
    10: (0.5, 0.2),
    11: (0.8, 0.3),
    12: (0.8, 0.3),
    13: (0.7, 0.3),
    14: (0.8, 0.3),
}


def spatial_graph(rows: int, columns: int) -> torch.Tensor:
    """Which patches of a grid touch, corners included, float32 [P, P].

    Example:
        >>> spatial_graph(2, 3).sum(1).tolist()
        [3.0, 5.0, 3.0, 3.0, 5.0, 3.0]
    """
    near_RR, near_CC = (
        (torch.arange(num)[:, None] - torch.arange(num)).abs() <= 1 for num in (rows, columns)
    )
    near_RCRC = near_RR[:, None, :, None] & near_CC[:, None]
    return near_RCRC.reshape(rows * columns, -1).float().fill_diagonal_(0)


def semantic_graph(x_BPC: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Every patch's most similar others by cosine, float32 [B, P, P], directed. O(P^2 C).

    Of equally similar ones the first.
    """
    unit_BPC = normalize(x_BPC.float(), dim=-1)
    alike_BPP = unit_BPC @ unit_BPC.transpose(1, 2)
    alike_BPP.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    num = min(neighbours, alike_BPP.shape[-1] - 1)
    if num == 0:
        return torch.zeros_like(alike_BPP)
    # Whole rows in order, as `ops.top_k` has them, would take longer than all else of the graph.
    value_BPk = alike_BPP.topk(min(num + 1, alike_BPP.shape[-1])).values
    least_BP1 = value_BPk[..., num - 1 : num]
    if alike_BPP.device.type == "cpu" and not bool((value_BPk[..., num:] == least_BP1).any()):
        return (alike_BPP >= least_BP1).float()
    above_BPP, tied_BPP = alike_BPP > least_BP1, alike_BPP == least_BP1
    free_BP1 = num - above_BPP.sum(2, keepdim=True)
    return (above_BPP | (tied_BPP & (tied_BPP.cumsum(2) <= free_BP1))).float()


def token_graph(
    x_BPC: torch.Tensor, plane: tuple[int, int], kind: Graph = "mixed", neighbours: int = 5
) -> torch.Tensor:
    """The normalised graph along which features are handed on, float32 [B, P, P].

    Spatial neighbours, semantic ones, or either; weighted by the square roots of both degrees.

    Args:
        x_BPC: patches of the first block's input.
        plane: rows and columns of the patches.
        kind: "mixed", "spatial" or "semantic".
        neighbours: of the semantic graph.

    Example:
        >>> token_graph(torch.randn(2, 6, 4), (2, 3)).shape
        torch.Size([2, 6, 6])

    Source: GTP-ViT, section 3.2 (arXiv 2311.03035).
    """
    graph_BPP = torch.zeros(x_BPC.shape[0], 1, 1, device=x_BPC.device)
    if kind != "semantic":
        graph_BPP = graph_BPP + spatial_graph(*plane).to(x_BPC.device)
    if kind != "spatial":
        graph_BPP = torch.maximum(graph_BPP, semantic_graph(x_BPC, neighbours))
    root_BP = graph_BPP.sum(2).clamp_min(1).rsqrt()
    return graph_BPP * root_BP[:, :, None] * root_BP[:, None]


def sparsified(attention_BHNN: torch.Tensor, share: float) -> torch.Tensor:
    """Attention with the smallest entries of every head set to zero, nothing scaled up for it.

    Args:
        attention_BHNN: softmax attention.
        share: fraction of the N x N entries that stay.
    """
    B, H, N, _ = attention_BHNN.shape
    lowest = int(N * N * (1 - share))  # as in the released code, hairs of floats included
    if lowest < 1:
        return attention_BHNN
    least_BH1 = attention_BHNN.reshape(B, H, -1).kthvalue(lowest, dim=2, keepdim=True).values
    return attention_BHNN.masked_fill(attention_BHNN < least_BH1[..., None], 0.0)


def importance(attention_BHNN: torch.Tensor, score: Score, prefix: int) -> torch.Tensor:
    """How important patches are, by the attention of one block; larger is more, float32 [B, n].

    Args:
        attention_BHNN: attention of all tokens.
        score: how it is read; "mixed": to oneself times received in all; "cls": from [CLS];
            "received": column sums; "diagonal": to oneself; each the largest or mean of the heads;
            "similarity": how little a token's row is like the others'.
        prefix: tokens in front of the patches.
    """
    if score == "similarity":
        unit_BNX = normalize(attention_BHNN.transpose(1, 2).flatten(2), dim=-1)
        return -(unit_BNX @ unit_BNX.sum(1)[..., None])[:, prefix:, 0]
    if score.startswith("cls"):
        return _over_heads(attention_BHNN[:, :, 0], score)[:, prefix:]
    own_BHN = attention_BHNN.diagonal(dim1=2, dim2=3)
    return _standing(attention_BHNN.sum(2), own_BHN, score)[:, prefix:]


def _standing(received_BHN: torch.Tensor, own_BHN: torch.Tensor, score: Score) -> torch.Tensor:
    """What tokens receive of all and keep of their own, as one number each, [B, N]."""
    received_BN, own_BN = _over_heads(received_BHN, score), _over_heads(own_BHN, score)
    if score.startswith("mixed"):
        return own_BN * received_BN
    return received_BN if score.startswith("received") else own_BN


def _bias(context: EncoderContext) -> torch.Tensor | None:
    """What the block adds to its logits."""
    return None if context.size_BN is None else context.size_BN[:, None, None].log()


def _over_heads(value_BHN: torch.Tensor, score: Score) -> torch.Tensor:
    return value_BHN.amax(1) if score.endswith("max") else value_BHN.mean(1)


def read_importance(
    q_BHNd: torch.Tensor,
    k_BHNd: torch.Tensor,
    score: Score,
    prefix: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`importance` of the attention of queries and keys, of which the matrix is not kept.

    O(H N^2 d), for the scores of "cls" O(H N d).

    Example:
        >>> q, k = torch.randn(2, 1, 3, 5, 8)
        >>> by_matrix = importance(ops.attention_matrix(q, k), "mixed_max", 1)
        >>> read_importance(q, k, "mixed_max", 1).allclose(by_matrix)
        True
    """
    if score.startswith("cls"):
        rows_BH1N = ops.attention_rows(q_BHNd[:, :, :1], k_BHNd, attn_mask=bias)
        return _over_heads(rows_BH1N[:, :, 0], score)[:, prefix:]
    if score == "similarity":
        return importance(ops.attention_matrix(q_BHNd, k_BHNd, bias), score, prefix)
    received_BHN, own_BHN = ops.attention_received_and_kept(q_BHNd, k_BHNd, bias)
    return _standing(received_BHN, own_BHN, score)[:, prefix:]


@dataclass(frozen=True)
class GTPViT(Method):
    """GTP-ViT: in every block the least important patches hand their features on and leave.

    As many leave every block, so that `retain` of the patches leave the last one. What they hand on
    goes to the neighbours that stay, in a graph made once of the first block's input.

    Args:
        graph: neighbours in the "spatial" grid, in the "semantic" space of features, or "mixed",
            both.
        neighbours: of a patch in the semantic graph.
        alpha: weight of what is handed on; None: the published one for so many patches per block.
        keep_attention: fraction of every head's attention entries that stay, the smallest being set
            to zero; None as above. Below 1 the method computes the block's attention itself and
            looks for the smallest, which takes longer than the block.
        score: what makes a patch important, see `importance`; "random" draws by the seed.
        token_scale: patches that were handed something count for more in later attention.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget
        >>> GTPViT().schedule(196, 12, Budget(retain=0.5))
        (9, 9, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8)

    Source: arXiv 2311.03035; details from the released code.
    """

    graph: Graph = "mixed"
    neighbours: int = 5
    alpha: float | None = None
    keep_attention: float | None = 1.0
    score: Score = "mixed_max"
    token_scale: bool = True

    card: ClassVar[Card] = Card(
        name="gtp_vit",
        title="GTP-ViT",
        paper="GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation",
        arxiv="2311.03035",
        year=2024,
        url="https://github.com/Ackesnal/GTP-ViT",
        licence="Apache-2.0",
        stages=("encoder",),
        kind="training-free",
        summary="Drops the least important patches of every encoder block and adds them to their "
        "neighbours in a graph.",
        defaults={
            "DeiT-B at 224, 8 patches a block": "0.6 of the attention, alpha 0.1: 81.46 of 81.8",
            "DeiT-B at 224, 14 patches a block": "0.8, alpha 0.3: 80.11",
        },
        headline=(
            "DeiT-S and DeiT-B: up to 26 % fewer FLOPs at 0.3 % lower accuracy, without training",
        ),
        notes=(
            "alpha comes from the authors' search for DeiT-B, by the share of patches that leave a "
            "block; so does the sparse attention of keep_attention=None, which by default is left "
            "out: finding the smallest entries takes longer than the block on a CPU.",
            "The number of semantic neighbours is not published per budget; 5 is ours.",
            "Patches stay in the order of the image; the released code leaves them in the order of "
            "importance, which gives the same features.",
            "Without [CLS] the released graph has one neighbour more; here as many as asked for. "
            "With nothing to drop it keeps nothing; here that leaves the image alone.",
            "What is handed on is added, so that sizes grow: they are not numbers of patches.",
            "Inside a vision-language model the projector finds at a dropped patch what its "
            "neighbours have become; one without any is in the state in which it left.",
            "Equal scores: the lower index is the more important.",
        ),
        retain=100 / 196,
    )
    reads_values: ClassVar[bool] = True
    encoder_drops: ClassVar[bool] = True
    encoder_point: ClassVar = ("block_start", "after_attention")

    def __post_init__(self) -> None:
        for name, options in (("graph", Graph), ("score", Score)):
            if getattr(self, name) not in get_args(options):
                choices = ", ".join(map(repr, get_args(options)))
                raise ValueError(f"{name} must be {choices}, got {getattr(self, name)!r}.")
        if isinstance(self.neighbours, bool) or self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1 patch, got {self.neighbours!r}.")
        if self.alpha is not None and not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}.")
        if self.keep_attention is not None and not 0 < self.keep_attention <= 1:
            raise ValueError(f"keep_attention must lie in (0, 1], got {self.keep_attention}.")

    @property
    def proportional_attention(self) -> bool:
        """Whether later blocks add log(size) to their attention logits."""
        return self.token_scale

    def schedule(self, num_patches: int, num_layers: int, budget: Budget) -> tuple[int, ...]:
        """Patches that leave every block."""
        keep = max(1, budget.count(num_patches))
        return tuple(ops.split_evenly(num_patches - keep, num_layers))

    def settings(self, num_patches: int, leaving: int) -> tuple[float, float]:
        """Fraction of the attention that stays, and alpha, where so many patches leave a block.

        Example:
            >>> GTPViT().settings(196, 8), GTPViT(keep_attention=None).settings(784, 32)
            ((1.0, 0.1), (0.6, 0.1))
        """
        row = min(_PUBLISHED, key=lambda number: abs(number - 196 * leaving / max(num_patches, 1)))
        share, alpha = _PUBLISHED[row]
        share = share if self.keep_attention is None else self.keep_attention
        return share, alpha if self.alpha is None else self.alpha

    # -- in a block -----------------------------------------------------------------------------

    def encoder_attention(self, context: EncoderContext) -> torch.Tensor | None:
        """Attention of one block: sparse where some is left out; all where it is read on the way.

        O(H N^2 d).
        """
        num_patches, leaving = self._leaving(context)
        share, _ = self.settings(num_patches, leaving)
        if share == 1:
            reads = self.score.startswith(("mixed", "received", "diagonal"))
            q, k, v = context.queries_BHNd, context.keys_BHNd, context.values_BHNd
            if not (context.in_place and reads and leaving) or q is None or k is None or v is None:
                return None
            out_BHNd, received_BHN, own_BHN = ops.attend_and_score(q, k, v, _bias(context))
            score_BN = _standing(received_BHN, own_BHN, self.score)
            context.state["score"] = score_BN[:, context.num_prefix :]
            return out_BHNd
        context.state["score"], out_BHNd = self._attend(context, share)
        return out_BHNd

    def _attend(
        self, context: EncoderContext, share: float
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Importance of the patches, and what the attention gives where it is sparse."""
        q, k, v = context.queries_BHNd, context.keys_BHNd, context.values_BHNd
        if q is None or k is None or v is None:
            raise ValueError(
                "gtp_vit reads queries, keys and values of the block; no other method can shorten "
                "the encoder beside it."
            )
        if share == 1 and self.score == "random":
            return None, None
        bias = _bias(context)
        B, H, N, _ = q.shape
        if share == 1 and self.score != "similarity":
            return read_importance(q, k, self.score, context.num_prefix, bias), None
        outs, scores, step = [], [], max(1, _BYTES // max(H * N * N * 4, 1))
        for first in range(0, B, step):
            part = slice(first, first + step)
            attention = ops.attention_matrix(q[part], k[part], None if bias is None else bias[part])
            if share < 1:
                attention = sparsified(attention, share)
                outs.append(attention.to(v.dtype) @ v[part])
            if self.score != "random":
                scores.append(importance(attention, self.score, context.num_prefix))
        return torch.cat(scores) if scores else None, torch.cat(outs) if outs else None

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Make the graph before the first block; hand on and drop between attention and MLP."""
        prefix, state = context.num_prefix, context.state
        x_BNC = tokens.x_BND
        B, N, _ = x_BNC.shape
        if tokens.mask_BN is not None and not bool(tokens.mask_BN.all()):
            raise ValueError("gtp_vit needs images of one size: padding has no place in its graph.")
        if context.point == "block_start":
            if context.layer == 0:
                state["patches"] = N - prefix
                plane = self._plane(context, N - prefix)
                state["graph"] = token_graph(x_BNC[:, prefix:], plane, self.graph, self.neighbours)
                # Where in the graph the present patches are.
                state["place"] = torch.arange(N - prefix, device=x_BNC.device).expand(B, -1)
            return None
        if "graph" not in state:
            raise ValueError("gtp_vit makes its graph before the first block, and was not asked.")
        num_patches, leaving = self._leaving(context)
        share, alpha = self.settings(num_patches, leaving)
        leaving = min(leaving, N - prefix - 1)
        if leaving <= 0:
            return None
        place_Bn = state["place"]
        if place_Bn.shape[1] != N - prefix:
            raise ValueError(
                f"gtp_vit has a graph of {place_Bn.shape[1]} patches and {N - prefix} are "
                "here: no other method can shorten the encoder beside it."
            )
        score_BP = state.pop("score", None)
        if score_BP is None and share == 1:
            score_BP = self._attend(context, share)[0]
        if score_BP is None:
            score_BP = torch.rand(
                B, N - prefix, generator=torch.Generator().manual_seed(context.seed + context.layer)
            ).to(x_BNC.device)
        kept_BK = ops.top_k(score_BP, N - prefix - leaving)
        context.note("importance", lambda: pad(score_BP, (prefix, 0), value=torch.nan))
        goes_Bn = torch.ones(B, N - prefix, dtype=torch.bool, device=x_BNC.device)
        gone_BR = goes_Bn.scatter_(1, kept_BK, False).nonzero()[:, 1].view(B, leaving)
        state["place"] = place_BK = place_Bn.gather(1, kept_BK)
        place_BR = place_Bn.gather(1, gone_BR)
        image_B11 = torch.arange(B, device=x_BNC.device)[:, None, None]
        weight_BKR = alpha * state["graph"][image_B11, place_BK[:, :, None], place_BR[:, None]]
        own_BP = torch.arange(prefix, device=x_BNC.device).expand(B, prefix)
        anchor_BM = torch.cat([own_BP, kept_BK + prefix], dim=1)
        weight_BMR = pad(weight_BKR, (0, 0, prefix, 0))
        return spread(N, anchor_BM, gone_BR + prefix, weight_BMR, conserve=False)

    def _leaving(self, context: EncoderContext) -> tuple[int, int]:
        """Patches of an image, and how many of them leave this block."""
        num_patches = context.state["patches"]
        schedule = self.schedule(num_patches, context.num_layers, context.budget)
        return num_patches, schedule[context.layer]

    @staticmethod
    def _plane(context: EncoderContext, num_patches: int) -> tuple[int, int]:
        plane = context.plane
        if plane is None:
            side = round(num_patches**0.5)
            plane = side, side
        if plane[0] * plane[1] != num_patches:
            raise ValueError(
                f"gtp_vit cannot tell how {num_patches} patches lie in a grid (the pixels say "
                f"{plane}); it needs whole images of patches."
            )
        return plane
