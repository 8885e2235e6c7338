"""Token Transforming: every token that is left draws on many, and every token feeds many.

Legend: B images, H heads, N tokens present (prefix tokens included), n patches among them, M of
them that stay, R that go, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize, pad

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    EncoderContext,
    Method,
    Reduction,
    Tokens,
    blocks_run,
    merged_groups,
    spread,
)


def shares(
    keys_Bnd: torch.Tensor,
    anchor_BM: torch.Tensor,
    gone_BR: torch.Tensor,
    *,
    tau: float = 0.003,
    top: int | None = None,
) -> torch.Tensor:
    """How much of every token that goes each anchor gets, float32 [B, M, R], columns adding to 1.

    A softmax over the anchors by the cosine of their keys. O(M R d).

    Args:
        keys_Bnd: what tokens are compared by.
        anchor_BM: the tokens that stay, int64.
        gone_BR: those that go, int64.
        tau: temperature; small ones come to plain merging.
        top: most anchors that share a token; None: all.

    Example:
        >>> keys = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [1, 1]]])
        >>> share = shares(keys, torch.tensor([[0, 2]]), torch.tensor([[1, 3]]))
        >>> share.round().tolist(), share[0, :, 1].tolist()
        ([[[1.0, 0.0], [0.0, 0.0]]], [0.5, 0.5])

    Source: the framework of Token Transforming (arXiv 2506.05709); the weights are ours.
    """
    unit_Bnd = normalize(keys_Bnd.float(), dim=-1)
    stay_BMd, gone_BRd = (
        unit_Bnd.gather(1, index[..., None].expand(-1, -1, unit_Bnd.shape[2]))
        for index in (anchor_BM, gone_BR)
    )
    logit_BMR = stay_BMd @ gone_BRd.transpose(1, 2) / tau
    if top is not None and top < logit_BMR.shape[1]:
        least_B1R = logit_BMR.topk(top, dim=1).values[:, -1:]
        logit_BMR = logit_BMR.masked_fill(logit_BMR < least_B1R, -torch.inf)
    # Shares of 1e-40 count for nothing, and slow every product that they enter down by ten times.
    return torch.threshold(logit_BMR.softmax(1), 1e-30, 0.0)


@dataclass(frozen=True)
class TokenTransforming(Method):
    """Token Transforming: tokens become fewer by a dense matrix, many to many.

    The patches that others resemble most go, and each is shared out among those that stay, to the
    likest most; what stays becomes the mean of itself and its shares, weighted by size. Sizes are
    shared out alike and added, as logarithms, to the logits of later attention.

    Args:
        tau: temperature of the shares over the cosine of keys; small ones come to plain merging.
        top: most tokens that share one; None: all.
        candidates: who may go: every second patch, for one of the others ("alternate"), or the half
            that receives less attention, for one of the other half ("unimportant").
        layers: blocks that have run before each reduction: numbers, or fractions of the depth. Each
            keeps the same fraction. None: in every block, as many tokens each time.
        prop_attn: add log(size) to the attention logits of later blocks.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget
        >>> TokenTransforming().schedule(196, 12, Budget(tokens=40))
        (13, 13, 13, 13, 13, 13, 13, 13, 13, 13, 13, 13)
        >>> TokenTransforming(layers=(3, 6, 9)).schedule(196, 12, Budget(retain=0.65**3))
        (0, 0, 68, 0, 0, 45, 0, 0, 29, 0, 0, 0)

    Source: arXiv 2506.05709 (its framework; no formulas or code were published).
    """

    tau: float = 0.003
    top: int | None = None
    candidates: Literal["alternate", "unimportant"] = "alternate"
    layers: tuple[int | float, ...] | None = None
    prop_attn: bool = True

    card: ClassVar[Card] = Card(
        name="token_transforming",
        title="Token Transforming",
        paper="Token Transforming: A Unified and Training-Free Token Compression Framework for "
        "Vision Transformer Acceleration",
        arxiv="2506.05709",
        year=2025,
        url="https://github.com/AuroraZengfh/TokenTransforming",
        stages=("encoder",),
        kind="training-free",
        summary="Shares the patches that others resemble most out among those that stay, in every "
        "encoder block.",
        defaults={"DeiT-S, DeiT-B": "12 or 13 fewer patches in each of 12 blocks (ours)"},
        headline=(
            "DeiT-S: 40 % fewer FLOPs, 1.5 times faster, 0.1 % lower accuracy, without training",
        ),
        notes=(
            "The paper's framework (every reduction is a matrix) is that of this library. Its "
            "formulas were not at hand: who goes, the shares, their temperature and the schedule "
            "are ours, chosen by what they leave of DINOv2's features (docs/encoders.md).",
            "At most half of the patches of a block go at once.",
            "Prefix tokens stay as they are, and feed nothing.",
            "Dense features come back as the mean of the tokens that a patch has fed, by weight.",
            "Inside a vision-language model it saves encoder time, not prompt length.",
        ),
        retain=48 / 196,
    )

    def __post_init__(self) -> None:
        if self.layers is not None:  # JSON has no tuples.
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers or any(value <= 0 for value in self.layers):
                raise ValueError(f"layers must be above 0, got {self.layers}.")
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}.")
        if self.candidates not in ("alternate", "unimportant"):
            raise ValueError(
                f'candidates must be "alternate" or "unimportant", got {self.candidates!r}.'
            )
        if self.top is not None and (isinstance(self.top, bool) or self.top < 1):
            raise ValueError(f"top must be at least 1 (or None), got {self.top!r}.")

    @property
    def proportional_attention(self) -> bool:
        """Whether later blocks add log(size) to their attention logits."""
        return self.prop_attn

    def schedule(self, num_patches: int, num_layers: int, budget: Budget) -> tuple[int, ...]:
        """Tokens by which every block makes an image shorter.

        Raises:
            ValueError: a layer lies behind the last block.
        """
        keep = max(1, budget.count(num_patches))
        if self.layers is None:
            return tuple(ops.split_evenly(num_patches - keep, num_layers))
        fewer = [0] * num_layers
        blocks = sorted(self._block(value, num_layers) for value in self.layers)
        left = num_patches
        for number, block in enumerate(blocks, 1):
            target = round(num_patches * (keep / num_patches) ** (number / len(blocks)))
            fewer[block] += left - target
            left = target
        return tuple(fewer)

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when a layer lies behind the last block."""
        for value in self.layers or ():
            if num_encoder_layers is not None:
                self._block(value, num_encoder_layers)

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Mix the patches of all images into fewer, after the attention of one block."""
        prefix, (B, N) = context.num_prefix, tokens.x_BND.shape[:2]
        k_BHNd = context.keys_BHNd
        if k_BHNd is None:
            raise ValueError(
                "token_transforming needs the keys of the block, and the context has none."
            )
        if tokens.mask_BN is not None and not bool(tokens.mask_BN.all()):
            raise ValueError(
                "token_transforming needs images of one size: padding would be mixed into patches."
            )
        patches = context.state.setdefault("patches", N - prefix)
        fewer = self.schedule(patches, context.num_layers, context.budget)[context.layer]
        fewer = min(fewer, (N - prefix) // 2)
        if fewer <= 0:
            return None
        keys_Bnd = k_BHNd.mean(1)[:, prefix:].float()
        gone_BR = self._leaving(keys_Bnd, fewer, lambda: self._received(context, prefix))
        stays_Bn = torch.ones(B, N - prefix, dtype=torch.bool, device=tokens.device)
        stays_Bn.scatter_(1, gone_BR, False)
        anchor_BM = stays_Bn.nonzero()[:, 1].view(B, -1)
        share_BMR = shares(keys_Bnd, anchor_BM, gone_BR, tau=self.tau, top=self.top)
        size_BN = tokens.size_BN
        if size_BN is None:
            size_BN = torch.ones(B, N, device=tokens.device)
        mass_BMR = share_BMR * size_BN[:, prefix:].gather(1, gone_BR)[:, None]
        own_BM = size_BN[:, prefix:].gather(1, anchor_BM)
        total_BM = own_BM + mass_BMR.sum(2)
        own_BP = torch.arange(prefix, device=tokens.device).expand(B, prefix)
        reduction = spread(
            N,
            torch.cat([own_BP, anchor_BM + prefix], dim=1),
            gone_BR + prefix,
            pad(mass_BMR / total_BM[..., None], (0, 0, prefix, 0)),
            pad(own_BM / total_BM, (prefix, 0), value=1.0),
        )
        context.note("groups", lambda: merged_groups(reduction), "label", "mixed in this block")
        return reduction

    def _leaving(
        self, keys_Bnd: torch.Tensor, fewer: int, received: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The candidates that one of the others resembles most, ascending int64 [B, R]."""
        n, device = keys_Bnd.shape[1], keys_Bnd.device
        if self.candidates == "alternate":
            may_go_Bn = (torch.arange(n, device=device) % 2 == 0).expand(len(keys_Bnd), n)
        else:
            may_go_Bn = ops.ranks(received()) >= n - n // 2
        unit_Bnd = normalize(keys_Bnd, dim=-1)
        alike_Bnn = unit_Bnd @ unit_Bnd.transpose(1, 2)
        best_Bn = alike_Bnn.masked_fill(may_go_Bn[:, None], -torch.inf).amax(2)
        return ops.top_k(best_Bn, fewer, mask=may_go_Bn)

    @staticmethod
    def _received(context: EncoderContext, prefix: int) -> torch.Tensor:
        """Attention that every patch receives, float32 [B, n]."""
        q_BHNd, k_BHNd = context.queries_BHNd, context.keys_BHNd
        assert q_BHNd is not None and k_BHNd is not None
        bias = None if context.size_BN is None else context.size_BN.log()[:, None, None]
        return ops.attention_column_sums(q_BHNd, k_BHNd, attn_mask=bias)[:, prefix:]

    @staticmethod
    def _block(value: int | float, num_layers: int) -> int:
        number = blocks_run(value, num_layers)
        if number > num_layers:
            raise ValueError(f"layers = {value}: this encoder has {num_layers} blocks.")
        return number - 1
