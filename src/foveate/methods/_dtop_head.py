"""The heads of Dynamic Token Pruning: one query per class, whose attention is the class's mask.

Legend: B images, K classes, n tokens (padded), C channels of the encoder, D channels of the head,
H its attention heads, d channels of one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MaskAttention(nn.Module):
    """Cross-attention that also gives its logits before the softmax, averaged over the heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.attn_drop = nn.Dropout(dropout)

    def forward(
        self, query_BKD: Tensor, y_BnD: Tensor, mask_Bn: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the queries read, [B, K, D], and the logits, [B, K, n]."""

        def split(x_BND: Tensor) -> Tensor:
            return x_BND.unflatten(2, (self.heads, -1)).transpose(1, 2)

        q_BHKd, k_BHnd, v_BHnd = (
            split(self.q(query_BKD)),
            split(self.k(y_BnD)),
            split(self.v(y_BnD)),
        )
        logits_BHKn = q_BHKd @ k_BHnd.transpose(2, 3) * q_BHKd.shape[-1] ** -0.5
        shown_BHKn = logits_BHKn
        if mask_Bn is not None:
            shown_BHKn = logits_BHKn.masked_fill(~mask_Bn[:, None, None], -torch.inf)
        out_BHKd = self.attn_drop(shown_BHKn.softmax(-1)) @ v_BHnd
        return self.proj(out_BHKd.transpose(1, 2).flatten(2)), logits_BHKn.mean(1)


class MaskLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the tokens, MLP; norms behind each."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.multihead_attn = MaskAttention(width, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, query_BKD: Tensor, y_BnD: Tensor, mask_Bn: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The queries behind the layer, and its mask logits."""
        drop = self.dropout
        own_BKD = self.self_attn(query_BKD, query_BKD, query_BKD, need_weights=False)[0]
        query_BKD = self.norm1(query_BKD + drop(own_BKD))
        read_BKD, logits_BKn = self.multihead_attn(query_BKD, y_BnD, mask_Bn)
        query_BKD = self.norm2(query_BKD + drop(read_BKD))
        inner_BKX = drop(self.linear1(query_BKD).relu())
        return self.norm3(query_BKD + drop(self.linear2(inner_BKX))), logits_BKn


class _Decoder(nn.Module):
    """The layers. The released names put them under `decoder`."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MaskLayer(width, heads, dropout) for _ in range(layers))


class MaskHead(nn.Module):
    """An attention-to-mask head: which class each token belongs to, and which classes there are.

    Args:
        in_width: C, channels of the encoder.
        num_classes: K.
        width: D.
        num_heads: attention heads; divides the width.
        num_layers: decoder layers.
        dropout: in training.

    Raises:
        ValueError: the heads do not divide the width, or a number is below 1.

    Example:
        >>> head = MaskHead(in_width=24, num_classes=3, width=8, num_heads=2)
        >>> masks, classes = head(torch.randn(2, 10, 24))
        >>> tuple(masks.shape), tuple(classes.shape)
        ((2, 3, 10), (2, 3, 2))

    Source: arXiv 2308.01045; parameters are named as in its released code.
    """

    def __init__(
        self,
        in_width: int,
        num_classes: int,
        width: int = 384,
        num_heads: int = 6,
        num_layers: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if min(in_width, num_classes, num_layers, num_heads) < 1 or width % max(num_heads, 1):
            raise ValueError(
                f"A head of {num_layers} layers for {num_classes} classes with {num_heads} "
                f"attention heads of a width of {width}: every number is at least 1, and the heads "
                "divide the width."
            )
        self.input_proj = nn.Linear(in_width, width)
        self.proj_norm = nn.LayerNorm(width)
        self.decoder = _Decoder(width, num_heads, num_layers, dropout)
        self.q = nn.Embedding(num_classes, width)
        self.class_embed = nn.Linear(width, 2)

    @property
    def in_width(self) -> int:
        """C."""
        return self.input_proj.in_features

    @property
    def num_classes(self) -> int:
        """K."""
        return self.q.num_embeddings

    def forward(self, x_BnC: Tensor, mask_Bn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mask logits [B, K, n] and logits [B, K, 2] of (present, absent).

        O(n D (C + layers (D + K))).

        Args:
            x_BnC: tokens of a block's output.
            mask_Bn: bool, which of them exist; the logits of the others mean nothing.
        """
        y_BnD = self.proj_norm(self.input_proj(x_BnC))
        query_BKD = self.q.weight.expand(x_BnC.shape[0], -1, -1)
        logits_BKn = query_BKD  # of the last layer
        for layer in self.decoder.layers:
            query_BKD, logits_BKn = layer(query_BKD, y_BnD, mask_Bn)
        return logits_BKn, self.class_embed(query_BKD)

    def flops(self, num_tokens: int) -> int:
        """FLOPs of one image, a multiply-add being two; norms and softmax are not counted."""
        n, K, D = num_tokens, self.num_classes, self.input_proj.out_features
        self_attention = 4 * K * D * D + 2 * K * K * D
        cross_attention = 2 * (n + K) * D * D + 2 * n * K * D
        layer = self_attention + cross_attention + 8 * K * D * D
        return 2 * (n * self.in_width * D + len(self.decoder.layers) * layer + 2 * K * D)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], num_heads: int = 6) -> MaskHead:
        """A head with the given weights, in eval mode.

        Args:
            tensors: by the names of its parameters.
            num_heads: attention heads, which no shape tells.

        Raises:
            ValueError: a tensor is missing, or its shape does not fit.

        Example:
            >>> head = MaskHead(24, 3, 8, 2)
            >>> MaskHead.from_tensors(head.state_dict(), 2).num_classes
            3
        """
        try:
            (width, in_width), num_classes = (
                tensors["input_proj.weight"].shape,
                len(tensors["q.weight"]),
            )
        except KeyError as error:
            raise ValueError(
                f"A head needs a tensor {error}; there are {_some(tensors)}."
            ) from None
        found = {int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers.")}
        head = cls(in_width, num_classes, width, num_heads, max(found, default=-1) + 1)
        try:
            head.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ValueError(f"These are not the tensors of a head: {error}") from None
        return head.eval()


def heads_from_tensors(tensors: Mapping[str, Tensor], num_heads: int = 6) -> tuple[MaskHead, ...]:
    """The heads of a file, one per stage in order.

    Args:
        tensors: named `heads.0.` and so on, or as released, `auxiliary_head.0.` ... and
            `decode_head.`; what else is there does not matter.
        num_heads: attention heads of each.

    Raises:
        ValueError: there is no head, a number is missing, or a head is incomplete.

    Example:
        >>> head = MaskHead(24, 3, 8, 2)
        >>> tensors = {f"heads.0.{k}": v for k, v in head.state_dict().items()}
        >>> len(heads_from_tensors(tensors, num_heads=2))
        1
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if first == "decode_head":
            parts.setdefault("last", {})[rest] = value
        elif first in ("heads", "auxiliary_head"):
            number, _, rest = rest.partition(".")
            parts.setdefault(number, {})[rest] = value
    order = [str(number) for number in range(len(parts) - ("last" in parts))]
    order += ["last"] * ("last" in parts)
    if not parts or set(order) != set(parts):
        raise ValueError(
            "Heads are named heads.0., heads.1., ... (or auxiliary_head.0., ..., decode_head.); "
            f"found {_some(tensors)}."
        )
    return tuple(MaskHead.from_tensors(parts[number], num_heads) for number in order)


def heads_to_tensors(heads: tuple[MaskHead, ...]) -> dict[str, Tensor]:
    """The heads' weights by the names that `heads_from_tensors` reads, for a safetensors file."""
    return {
        f"heads.{number}.{name}": value.detach().clone()
        for number, head in enumerate(heads)
        for name, value in head.state_dict().items()
    }


def _some(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "none"
