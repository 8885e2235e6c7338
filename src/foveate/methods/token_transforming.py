"""Token Transforming: every token that is left draws on many, and every token feeds many.

Legend: B images, H heads, N tokens present (prefix tokens included), n patches among them, M of
them that stay, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize, pad

from foveate import ops
from foveate.core import Budget, Card, EncoderContext, Method, Reduction, Tokens


def mixing_weights(
    keys_Bnd: torch.Tensor,
    importance_Bn: torch.Tensor,
    anchor_BM: torch.Tensor,
    size_Bn: torch.Tensor | None = None,
    *,
    tau: float = 0.1,
    top: int | None = None,
) -> torch.Tensor:
    """How much every anchor draws on every token, float32 [B, M, n], rows adding up to 1.

    A softmax over the likeness of keys, in which important and large tokens weigh more; no token
    weighs more in an anchor than the anchor itself. O(M n d).

    Args:
        keys_Bnd: what tokens are compared by, with cosine.
        importance_Bn: above 0.
        anchor_BM: the tokens that stay, int64.
        size_Bn: how many source tokens each stands for; None: one each.
        tau: temperature; small ones come to plain pruning.
        top: weights left in every row, the largest; every token keeps its largest one in any case,
            so that none is lost. None: all.

    Example:
        >>> weight = mixing_weights(torch.eye(4)[None], torch.ones(1, 4), torch.tensor([[0, 2]]))
        >>> weight.sum(2).tolist(), bool(weight[0, 1].argmax() == 2)
        ([[1.0, 1.0]], True)

    Source: the framework of Token Transforming (arXiv 2506.05709); the weights are ours.
    """
    unit_Bnd = normalize(keys_Bnd.float(), dim=-1)
    own_BMd = unit_Bnd.gather(1, anchor_BM[..., None].expand(-1, -1, unit_Bnd.shape[2]))
    prior_Bn = importance_Bn.float().log()
    if size_Bn is not None:
        prior_Bn = prior_Bn + size_Bn.float().log()
    logit_BMn = own_BMd @ unit_Bnd.transpose(1, 2) / tau + prior_Bn[:, None]
    most_BM1 = logit_BMn.amax(2, keepdim=True)
    logit_BMn = logit_BMn.scatter(2, anchor_BM[..., None], most_BM1)
    if top is not None and top < logit_BMn.shape[2]:
        least_BM1 = logit_BMn.topk(top, dim=2).values[..., -1:]
        best_B1n = logit_BMn.softmax(2).argmax(1, keepdim=True)
        stays_BMn = (logit_BMn >= least_BM1).scatter(1, best_B1n, True)
        logit_BMn = logit_BMn.masked_fill(~stays_BMn, -torch.inf)
    return logit_BMn.softmax(2)


@dataclass(frozen=True)
class TokenTransforming(Method):
    """Token Transforming: tokens become fewer by a dense matrix, many to many.

    Patches that receive the most attention stay as anchors, in the order of the image; each becomes
    a weighted mean of all patches, near ones by their keys most. Sizes are shared out in proportion
    to the weights and added, as logarithms, to the logits of later attention.

    Args:
        tau: temperature of the weights; small ones come to plain pruning.
        top: weights left to every anchor; None: all.
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
        (0, 0, 69, 0, 0, 44, 0, 0, 29, 0, 0, 0)

    Source: arXiv 2506.05709 (its framework; no formulas or code were published).
    """

    tau: float = 0.1
    top: int | None = None
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
        summary="Turns the patches of every encoder block into fewer by a many-to-many matrix over "
        "the likeness of their keys.",
        defaults={"DeiT-S, DeiT-B": "12 or 13 fewer patches in each of 12 blocks (ours)"},
        headline=(
            "DeiT-S: 40 % fewer FLOPs, 1.5 times faster, 0.1 % lower accuracy, without training",
        ),
        notes=(
            "The paper's framework (every reduction is a matrix) is that of this library. Its "
            "formulas were not at hand: choice of anchors, weights, temperature and schedule are "
            "ours, made to meet the published FLOPs.",
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
        q_BHNd, k_BHNd = context.queries_BHNd, context.keys_BHNd
        if q_BHNd is None or k_BHNd is None:
            raise ValueError(
                "token_transforming needs queries and keys of the block, and the context has none."
            )
        if tokens.mask_BN is not None and not bool(tokens.mask_BN.all()):
            raise ValueError(
                "token_transforming needs images of one size: padding would be mixed into patches."
            )
        patches = context.state.setdefault("patches", N - prefix)
        fewer = self.schedule(patches, context.num_layers, context.budget)[context.layer]
        keep = max(1, N - prefix - fewer)
        if keep >= N - prefix:
            return None
        bias = None if context.size_BN is None else context.size_BN.log()[:, None, None]
        received_BN = ops.attention_column_sums(q_BHNd, k_BHNd, attn_mask=bias) / N
        importance_Bn = received_BN[:, prefix:].clamp_min(torch.finfo(torch.float32).tiny)
        anchor_BM = ops.top_k(importance_Bn, keep)
        size_Bn = None if tokens.size_BN is None else tokens.size_BN[:, prefix:]
        keys_Bnd = k_BHNd.mean(1)[:, prefix:]
        weight_BMn = mixing_weights(
            keys_Bnd, importance_Bn, anchor_BM, size_Bn, tau=self.tau, top=self.top
        )
        context.note("importance", lambda: pad(importance_Bn, (prefix, 0), value=torch.nan))
        matrix_BMN = pad(weight_BMn, (prefix, 0, prefix, 0))
        matrix_BMN[:, range(prefix), range(prefix)] = 1.0
        own_BP = torch.arange(prefix, device=tokens.device).expand(B, prefix)
        return Reduction.transform(matrix_BMN, torch.cat([own_BP, anchor_BM + prefix], dim=1))

    @staticmethod
    def _block(value: int | float, num_layers: int) -> int:
        number = max(1, round(value * num_layers)) if value < 1 else int(value)
        if number > num_layers:
            raise ValueError(f"layers = {value}: this encoder has {num_layers} blocks.")
        return number - 1
