"""The trained parts of QTSplus: scoring, budget and re-encoding.

Legend: B samples, M visual tokens (padded), L tokens of the question (padded), n kept tokens
(padded), D channels, H query heads, G key heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from foveate import ops
from foveate.methods._qtsplus_gate import sample_gate, solve_threshold

HIDDEN = 256
_EPS = 1e-8


class _MLP(nn.Module):
    """Two layers. The released names put them under `net`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class QueryLayer(nn.Module):
    """Queries that attend to tokens, with grouped heads and without positions.

    Args:
        width: D.
        heads: H, of D / H channels each.
        kv_heads: G; divides H.
        ffn_width: of the MLP behind the attention; None: 4 D.

    Raises:
        ValueError: the heads do not divide the width, or one another.

    Source: QTSplus (arXiv 2511.11910); parameters are named as in its released weights.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, ffn_width: int | None = None) -> None:
        super().__init__()
        if heads < 1 or kv_heads < 1 or width % heads or heads % kv_heads:
            raise ValueError(
                f"{heads} heads must divide the width {width}, and {kv_heads} key heads them."
            )
        self.heads, self.kv_heads = heads, kv_heads
        kv_width, ffn_width = kv_heads * width // heads, ffn_width or 4 * width
        self.q_norm, self.kv_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.ffn = _MLP(width, ffn_width)

    def _heads(self, x_BND: Tensor, heads: int) -> Tensor:
        return x_BND.unflatten(2, (heads, -1)).transpose(1, 2)

    def relevance(
        self,
        query_BLD: Tensor,
        x_BMD: Tensor,
        mask_BM: Tensor | None = None,
        query_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """The most attention of any head and query to every token, float32 [B, M]."""
        q_BHLd = self._heads(self.q_proj(self.q_norm(query_BLD)), self.heads)
        k_BGMd = self._heads(self.k_proj(self.kv_norm(x_BMD)), self.kv_heads)
        return ops.peak_attention(q_BHLd, k_BGMd, key_mask=mask_BM, query_mask=query_mask_BL)

    def forward(self, query_BLD: Tensor, x_BMD: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """The queries after attention and MLP, [B, L, D]; tokens that `mask_BM` hides are unseen.

        O(L M D + L D^2).
        """
        q_BHLd = self._heads(self.q_proj(self.q_norm(query_BLD)), self.heads)
        kv_BMD = self.kv_norm(x_BMD)
        k_BGMd = self._heads(self.k_proj(kv_BMD), self.kv_heads)
        v_BGMd = self._heads(self.v_proj(kv_BMD), self.kv_heads)
        mask = None if mask_BM is None else mask_BM[:, None, None]
        out_BHLd = scaled_dot_product_attention(q_BHLd, k_BGMd, v_BGMd, mask, enable_gqa=True)
        query_BLD = query_BLD + self.o_proj(out_BHLd.transpose(1, 2).flatten(2))
        return query_BLD + self.ffn(self.ffn_norm(query_BLD))


class _Reencoder(nn.Module):
    """Self-attention: queries are the tokens. The released names put the layer under `core`."""

    def __init__(self, *shape: int | None) -> None:
        super().__init__()
        self.core = QueryLayer(*shape)  # type: ignore[arg-type]

    def forward(self, x_BnD: Tensor, mask_Bn: Tensor | None) -> Tensor:
        return self.core(x_BnD, x_BnD, mask_Bn)


class BudgetHead(nn.Module):
    """Which fraction of the tokens to keep, from the question and the spread of relevance.

    Args:
        width: D.
        low, high: bounds of the fraction kept, rho_min and rho_max.
    """

    def __init__(self, width: int, low: float = 0.05, high: float = 0.5) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.mlp = nn.Sequential(nn.Linear(width + 3, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))

    def forward(self, question_BD: Tensor, relevance_BM: Tensor, num_B: Tensor) -> Tensor:
        """The fraction kept, rho, [B].

        Args:
            question_BD: mean embedding of the question.
            relevance_BM: of every token, 0 where there is none.
            num_B: tokens of every sample.
        """
        spread_B3 = torch.stack(
            [num_B.to(relevance_BM.dtype).log(), relevance_BM.amax(1), entropy(relevance_BM)], 1
        )
        features = torch.cat([question_BD.to(spread_B3.dtype), spread_B3], dim=1)
        share_B = self.mlp(features.to(next(self.parameters()).dtype))[:, 0].sigmoid()
        return self.low + (self.high - self.low) * share_B


def entropy(relevance_BM: Tensor) -> Tensor:
    """Entropy of the relevance as a distribution over tokens, in nats, [B].

    Example:
        >>> entropy(torch.ones(1, 4)).exp().round().tolist()
        [4.0]
    """
    p_BM = relevance_BM / (relevance_BM.sum(1, keepdim=True) + _EPS)
    return -(p_BM * (p_BM + _EPS).log()).sum(1)


@dataclass(frozen=True, eq=False)
class Gated:
    """What the gate makes of a batch.

    Attributes:
        x_BnD: kept tokens in their order, re-encoded; padding is 0.
        index_Bn: their places among the M tokens, int64; -1 is padding.
        relevance_BM: of every token, float32; 0 is padding.
        rho_B: fraction that the budget head asked for.
        num_B: tokens there were, int64.
    """

    x_BnD: Tensor
    index_Bn: Tensor
    relevance_BM: Tensor
    rho_B: Tensor
    num_B: Tensor

    @property
    def mask_Bn(self) -> Tensor:
        """Which of the kept tokens exist."""
        return self.index_Bn >= 0


class QueryGate(nn.Module):
    """QTSplus between projector and language model: score, decide how many, choose, re-encode.

    In training mode the choice is sampled around a threshold and gradients reach every part; in
    evaluation it is the `n` most relevant tokens, ties to the first. Samples of a batch do not see
    one another, nor their padding.

    Args:
        width: D, of the language model.
        heads, kv_heads: of every layer.
        scoring_layers, reencode_layers: how many.
        ffn_width: of their MLPs; None: 4 D.
        rho: least and largest fraction kept.
        most: tokens kept at most in evaluation, n_max.
        tau: temperature of the training gate.
        released: sample as the released code does, see `sample_gate`.

    Raises:
        ValueError: there is no scoring layer, or a number is out of range.

    Example:
        >>> gate = QueryGate(32, heads=4, kv_heads=2).eval()
        >>> gated = gate(torch.randn(1, 100, 32), torch.randn(1, 6, 32))
        >>> gated.x_BnD.shape[1] == gated.index_Bn.shape[1] <= 50
        True

    Source: QTSplus (arXiv 2511.11910).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        scoring_layers: int = 1,
        reencode_layers: int = 1,
        ffn_width: int | None = None,
        rho: tuple[float, float] = (0.05, 0.5),
        most: int = 2560,
        tau: float = 0.1,
        released: bool = False,
    ) -> None:
        super().__init__()
        if scoring_layers < 1 or reencode_layers < 0 or most < 1 or not tau > 0:
            raise ValueError(
                "A gate needs a scoring layer, most >= 1 and tau > 0, got "
                f"{scoring_layers}, {most} and {tau}."
            )
        if not 0 < rho[0] <= rho[1] <= 1:
            raise ValueError(f"rho must be 0 < low <= high <= 1, got {rho}.")
        shape = (width, heads, kv_heads, ffn_width)
        self.width, self.most, self.tau, self.released = width, most, tau, released
        self.scoring_layers = nn.ModuleList(QueryLayer(*shape) for _ in range(scoring_layers))
        self.budget = BudgetHead(width, *rho)
        self.reencode_layers = nn.ModuleList(_Reencoder(*shape) for _ in range(reencode_layers))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], head_dim: int = 128, **options: object
    ) -> QueryGate:
        """The gate that released weights describe, in evaluation mode.

        Args:
            tensors: names as released, under any one prefix; other names are ignored.
            head_dim: channels of a head (128 in Qwen2.5-VL), which no shape tells.
            **options: `rho`, `most`, `tau` and `released` of the class.

        Raises:
            ValueError: tensors are missing or do not fit each other, or `head_dim` does not fit.
        """
        own = _without_prefix(tensors)
        q_DD, k_KD = own["scoring_layers.0.q_proj.weight"], own["scoring_layers.0.k_proj.weight"]
        width, kv_width = q_DD.shape[1], k_KD.shape[0]
        if head_dim < 1 or width % head_dim or kv_width % head_dim:
            raise ValueError(
                f"head_dim = {head_dim} must divide the widths {width} and {kv_width} of queries "
                "and keys; Qwen2.5-VL has 128."
            )
        with torch.device("meta"):
            gate = cls(
                width,
                width // head_dim,
                kv_width // head_dim,
                _num_layers(own, "scoring_layers"),
                _num_layers(own, "reencode_layers"),
                own["scoring_layers.0.ffn.net.0.weight"].shape[0],
                **options,  # type: ignore[arg-type]
            )
        try:
            gate.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise ValueError(f"These are no weights of QTSplus: {error}") from error
        return gate.eval()

    def score(
        self,
        x_BMD: Tensor,
        question_BLD: Tensor,
        mask_BM: Tensor | None = None,
        question_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Relevance [B, M], fraction to keep [B] and number of tokens [B] of every sample.

        O(L M D + M D^2).

        Args:
            x_BMD: visual tokens in the width of the language model.
            question_BLD: embeddings of the question alone.
            mask_BM, question_mask_BL: bool, False for padding; None: there is none.
        """
        B, M, _ = x_BMD.shape
        query_BLD = question_BLD
        *earlier, last = (cast("QueryLayer", layer) for layer in self.scoring_layers)
        for layer in earlier:
            query_BLD = layer(query_BLD, x_BMD, mask_BM)
        relevance_BM = last.relevance(query_BLD, x_BMD, mask_BM, question_mask_BL)
        num_B = torch.full((B,), M, device=x_BMD.device) if mask_BM is None else mask_BM.sum(1)
        if question_mask_BL is None:
            mean_BD = question_BLD.float().mean(1)
        else:
            weight_BL1 = question_mask_BL.float()[..., None]
            mean_BD = (question_BLD.float() * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)
        return relevance_BM, self.budget(mean_BD, relevance_BM, num_B), num_B

    def count(self, rho_B: Tensor, num_B: Tensor) -> Tensor:
        """Tokens kept in evaluation: the fraction, rounded up, at least 1 and at most `most`.

        Example:
            >>> QueryGate(8, 1, 1, most=9).count(torch.tensor([0.3, 0.5]), torch.tensor([10, 99]))
            tensor([3, 9])
        """
        return (rho_B * num_B).ceil().long().clamp(min=1, max=self.most).minimum(num_B)

    def reencode(
        self, x_BnD: Tensor, mask_Bn: Tensor | None = None, time_Bn: Tensor | None = None
    ) -> Tensor:
        """Kept tokens after self-attention among those of their sample, [B, n, D].

        Args:
            x_BnD: tokens in order.
            mask_Bn: which exist; None: all.
            time_Bn: time of every token, for an embedding of it that is added first; None: none,
                as released.
        """
        if time_Bn is not None:
            x_BnD = x_BnD + time_embedding(time_Bn, self.width).to(x_BnD.dtype)
        for layer in self.reencode_layers:
            x_BnD = layer(x_BnD, mask_Bn)
        return x_BnD if mask_Bn is None else x_BnD.masked_fill(~mask_Bn[..., None], 0.0)

    def forward(
        self,
        x_BMD: Tensor,
        question_BLD: Tensor,
        mask_BM: Tensor | None = None,
        question_mask_BL: Tensor | None = None,
        time_BM: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Gated:
        """Score, choose and re-encode; `generator` is that of the training gate."""
        relevance_BM, rho_B, num_B = self.score(x_BMD, question_BLD, mask_BM, question_mask_BL)
        if self.training:
            threshold_B = solve_threshold(relevance_BM, rho_B * num_B, self.tau, mask_BM)
            gate_BM = sample_gate(
                relevance_BM, threshold_B, self.tau, mask_BM, generator, self.released
            )
            kept_B = (gate_BM > 0.5).sum(1)
            index_Bn = ops.top_k_ragged(gate_BM.detach(), kept_B, mask=mask_BM)
            x_BMD = x_BMD * gate_BM[..., None].to(x_BMD.dtype)
        else:
            kept_B = self.count(rho_B, num_B)
            index_Bn = ops.top_k_ragged(relevance_BM.detach(), kept_B, mask=mask_BM)
        mask_Bn, place_Bn = index_Bn >= 0, index_Bn.clamp(min=0)
        time_Bn = None if time_BM is None else time_BM.gather(1, place_Bn)
        x_BnD = x_BMD.gather(1, place_Bn[..., None].expand(-1, -1, x_BMD.shape[2]))
        x_BnD = self.reencode(x_BnD.masked_fill(~mask_Bn[..., None], 0.0), mask_Bn, time_Bn)
        return Gated(x_BnD, index_Bn, relevance_BM, rho_B, num_B)


def time_embedding(time_Bn: Tensor, width: int) -> Tensor:
    """Sines and cosines of time at periods from 2 pi to 20000 pi, float32 [B, n, D].

    Example:
        >>> time_embedding(torch.zeros(1, 1), 4).tolist()
        [[[0.0, 0.0, 1.0, 1.0]]]
    """
    half = width // 2
    step_h = torch.arange(half, device=time_Bn.device, dtype=torch.float32) / max(half, 1)
    angle_Bnh = time_Bn[..., None].float() * torch.exp(-math.log(1e4) * step_h)
    return pad(torch.cat([angle_Bnh.sin(), angle_Bnh.cos()], dim=-1), (0, width - 2 * half))


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the gate, by the names they have in the module."""
    mark = "scoring_layers.0.q_proj.weight"
    found = [name for name in tensors if name == mark or name.endswith(f".{mark}")]
    if len(found) != 1:
        raise ValueError(
            f"Weights of QTSplus hold one {mark!r} under some prefix; these hold "
            f"{found or 'none'}. Names begin with {sorted(tensors)[:3]}."
        )
    prefix = found[0].removesuffix(mark)
    parts = tuple(prefix + part for part in ("scoring_layers.", "budget.", "reencode_layers."))
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(parts)}
    for needed in ("scoring_layers.0.k_proj.weight", "scoring_layers.0.ffn.net.0.weight"):
        if needed not in own:
            raise ValueError(f"These are no weights of QTSplus: {prefix + needed!r} is missing.")
    return own


def _num_layers(names: Mapping[str, Tensor], kind: str) -> int:
    numbers = [int(name.split(".")[1]) for name in names if name.startswith(f"{kind}.")]
    return max(numbers, default=-1) + 1
