"""DToP: patches whose class is certain leave a vision transformer early.

Legend: B images, K classes, M tokens present (prefix included), n patches among them (padded), N
tokens of an image before any reduction, P its patches, C channels of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import pad

from foveate import ops
from foveate.core import (
    Card,
    DensePrediction,
    EncoderContext,
    Method,
    Reduction,
    Tokens,
    blocks_run,
)
from foveate.core.units import select_tokens
from foveate.methods._dtop_head import MaskHead, heads_from_tensors, heads_to_tensors
from foveate.methods._dtop_loss import segmentation_loss

__all__ = [
    "DToP",
    "MaskHead",
    "heads_from_tensors",
    "heads_to_tensors",
    "segmentation_loss",
    "update_canvas",
]


@lru_cache(maxsize=2)
def _load(path: Path, changed: int, num_heads: int, device: torch.device) -> tuple[MaskHead, ...]:
    """The heads of a file; `changed` makes a rewritten file another one."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"dtop: {path} is no safetensors file: {error}") from error
    heads = heads_from_tensors(tensors, num_heads)
    return tuple(head.requires_grad_(False).to(device) for head in heads)


def update_canvas(
    canvas_BKP: torch.Tensor, logits_BKn: torch.Tensor, group_BP: torch.Tensor
) -> torch.Tensor:
    """Mask logits of all patches: those present get new ones, the others keep theirs.

    Args:
        canvas_BKP: what there was.
        logits_BKn: of the patches present.
        group_BP: which of them each patch is, or became part of; -1: it has left.

    Example:
        >>> canvas = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> update_canvas(canvas, torch.tensor([[[9.0]]]), torch.tensor([[-1, 0, -1]])).tolist()
        [[[1.0, 9.0, 3.0]]]
    """
    place_BKP = group_BP.clamp_min(0)[:, None].expand_as(canvas_BKP)
    return logits_BKn.gather(2, place_BKP).where(group_BP[:, None] >= 0, canvas_BKP)


@dataclass(frozen=True)
class DToP(Method):
    """DToP: heads inside the encoder predict a class for every patch; certain ones leave.

    Behind each stage a head predicts all patches that are left. Those whose score is above `tau`
    are final and leave, except the most certain few of every class, which stay to give context. The
    last head, behind the last block, predicts the rest. What the heads say, put together, is
    `Attachment.dense`; the cost depends on the image.

    With a budget of the call, every image keeps that fraction of its patches to the end instead,
    the same from stage to stage: the most certain leave, whatever their score.

    Args:
        weights: a safetensors file with the heads: `heads.0.` and so on, or as released,
            `auxiliary_head.0.` ... `decode_head.`.
        heads: the heads themselves instead, one per stage and one for the end; they are not written
            into recipes.
        tau: score, in (0, 1], above which a patch is final; 1: none is.
        after: blocks that have run before each of the earlier heads: a number, or a fraction of
            the depth.
        keep_per_class: certain patches of every class that stay all the same.
        num_heads: attention heads of the heads in `weights`.

    Raises:
        ValueError: a value is out of range, or both weights and heads are given.

    Example:
        >>> DToP().blocks(12), DToP(after=(1 / 3, 2 / 3)).blocks(24)
        ((5, 7, 11), (7, 15, 23))

    Source: arXiv 2308.01045; details from the released code.
    """

    weights: str | None = None
    heads: tuple[MaskHead, ...] = field(default=(), repr=False)
    tau: float = 0.9
    after: tuple[int | float, ...] = (1 / 2, 2 / 3)
    keep_per_class: int = 5
    num_heads: int = 6

    card: ClassVar[Card] = Card(
        name="dtop",
        title="DToP",
        paper="Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
        arxiv="2308.01045",
        year=2023,
        url="https://github.com/zbwxp/Dynamic-Token-Pruning",
        licence="BSD-2-Clause (its README asks for academic use)",
        stages=("encoder",),
        kind="trained",
        summary="Heads inside the encoder finalise the class of certain patches, which then leave; "
        "the predictions of all depths make one segmentation.",
        defaults={
            "ADE20K, ViT-B at 512": "stages end after blocks 6, 8, 12; tau 0.9; head width 384",
            "ADE20K, ViT-L at 640": "after blocks 8, 16, 24; tau 0.95; head width 512",
            "Pascal Context, ViT-L at 480": "the same",
            "COCO-Stuff10k, ViT-L at 512": "the same",
        },
        headline=(
            "mIoU and GFLOPs, untouched to pruned: ADE20K ViT-B 49.6 at 109.9 to 49.8 at 86.8, "
            "ViT-L 53.3 at 617.0 to 52.8 at 412.8; Context 63.0 at 315.4 to 62.7 at 224.3; "
            "COCO-Stuff10k 47.4 at 366.9 to 47.1 at 276.2",
            "20 to 35 % fewer FLOPs on average without loss of accuracy (abstract)",
        ),
        notes=(
            "It needs trained heads, weights=FILE or heads=(...), one per stage and one for the "
            "end; none ship with this package. foveate.methods.dtop.MaskHead is the published "
            "head, and segmentation_loss beside it what it is trained with.",
            "tau decides unless the call has a budget; then every image keeps retain of its "
            "patches to the end, in equal steps of the share kept, which is ours.",
            "The default retain says nothing but about how much tau is meant to leave.",
            "Prefix tokens ([CLS], registers) stay and are not shown to the heads; the published "
            "encoder drops [CLS].",
            "Images that differ in length share rows in which no image sees another; the released "
            "loop over images saves little time.",
            "Of equally certain patches the first stay. The last head never finalises, whatever "
            "tau is.",
            "The heads run in the precision of their weights. Their cost is in "
            "`Attachment.dense.flops`, beside that of the encoder in the report.",
            "With restore=True, and inside a vision-language model, a patch that has left is found "
            "in the state in which it left.",
        ),
        retain=0.5,
    )
    encoder_drops: ClassVar[bool] = True
    encoder_point: ClassVar = "block_end"

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", tuple(self.after))  # JSON has no tuples.
        object.__setattr__(self, "heads", tuple(self.heads))
        if self.weights is not None and self.heads:
            raise ValueError("Give weights, a file, or heads, the modules; not both.")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must lie in (0, 1], got {self.tau}.")
        ascending = list(self.after) == sorted(set(self.after))
        if not self.after or not ascending or any(value <= 0 for value in self.after):
            raise ValueError(f"after must be ascending and above 0, got {self.after}.")
        for name in ("keep_per_class", "num_heads"):
            value, least = getattr(self, name), int(name == "num_heads")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}.")

    def arguments(self) -> dict[str, Any]:
        """Fields that differ from their defaults, ready for JSON; modules cannot be written."""
        return {name: value for name, value in super().arguments().items() if name != "heads"}

    def blocks(self, num_layers: int) -> tuple[int, ...]:
        """The 0-based block behind which each head predicts; the last one ends the encoder.

        Raises:
            ValueError: a stage has no block of its own.
        """
        found = []
        for value in self.after:
            number = blocks_run(value, num_layers)
            if number >= num_layers or number - 1 in found:
                raise ValueError(
                    f"after = {self.after} and the end leave a stage without a block of its own in "
                    f"an encoder of {num_layers} blocks."
                )
            found.append(number - 1)
        return (*found, num_layers - 1)

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when there are no heads, not enough, or not as many blocks."""
        if self.weights is None and not self.heads:
            raise ValueError(
                "dtop decides by what heads inside the encoder predict, and has none: pass "
                "weights='heads.safetensors' or heads=(head, ...), "
                f"{len(self.after) + 1} of them, trained on the classes you want "
                "(foveate.methods.dtop.MaskHead, segmentation_loss beside it)."
            )
        if self.weights is not None and not Path(self.weights).expanduser().is_file():
            raise ValueError(f"dtop: there is no file weights={self.weights!r}.")
        if self.heads:
            self._checked(self.heads)
        if num_encoder_layers is not None:
            self.blocks(num_encoder_layers)

    # -- behind a block -------------------------------------------------------------------------

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Predict behind the last block of a stage, and let the certain patches leave."""
        blocks = self.blocks(context.num_layers)
        if context.layer not in blocks or context.budget.is_full:
            return None
        stage, prefix, state = blocks.index(context.layer), context.num_prefix, context.state
        x_BnC = tokens.x_BND[:, prefix:]
        mask_Bn = None if tokens.mask_BN is None else tokens.mask_BN[:, prefix:]
        head = self._heads(x_BnC.device)[stage]
        if head.in_width != x_BnC.shape[2]:
            raise ValueError(
                f"This head of dtop is for an encoder of width {head.in_width}, not "
                f"{x_BnC.shape[2]}."
            )
        with torch.no_grad():
            logits_BKn, class_BK2 = head(x_BnC.to(head.q.weight.dtype), mask_Bn)
        counts = [x_BnC.shape[1]] * len(x_BnC) if mask_Bn is None else mask_Bn.sum(1).tolist()
        state["flops"] = state.get("flops", 0) + sum(map(head.flops, counts))
        self._paint(tokens, logits_BKn, stage, context)
        if stage == len(blocks) - 1:
            self._publish(class_BK2, context)
            return None
        score_BKn = ops.presence_scores(logits_BKn, class_BK2)
        stays_Bn = self._staying(score_BKn, mask_Bn, stage, context)
        context.note("certainty", lambda: pad(score_BKn.amax(1), (prefix, 0), value=torch.nan))
        prefix_BP = torch.ones(len(x_BnC), prefix, dtype=torch.bool, device=x_BnC.device)
        return select_tokens(torch.cat([prefix_BP, stays_Bn], dim=1))

    def _staying(
        self,
        score_BKn: torch.Tensor,
        mask_Bn: torch.Tensor | None,
        stage: int,
        context: EncoderContext,
    ) -> torch.Tensor:
        """Which patches go on to the next stage, bool [B, n]."""
        B, _, n = score_BKn.shape
        if mask_Bn is None:
            mask_Bn = torch.ones(B, n, dtype=torch.bool, device=score_BKn.device)
        if context.budget.published:
            gone_Bn = ops.sure_tokens(score_BKn, self.tau, self.keep_per_class, mask_Bn)
            return mask_Bn & ~gone_Bn
        # Images that entered with fewer patches lose in proportion.
        first_B = context.state.setdefault("first", mask_Bn.sum(1))
        share = context.budget.fraction(context.state.setdefault("patches", n))
        keep_B = first_B * share ** ((stage + 1) / len(self.after))
        keep_B = torch.minimum(keep_B.round().long().clamp_min(1), mask_Bn.sum(1))
        return ops.least_sure_tokens(score_BKn, keep_B, self.keep_per_class, mask_Bn)

    def _paint(
        self, tokens: Tokens, logits_BKn: torch.Tensor, stage: int, context: EncoderContext
    ) -> None:
        """Put the logits of the patches present on the canvas of all of them."""
        prefix, state = context.num_prefix, context.state
        if tokens.reduction is None:
            group_BP = torch.arange(logits_BKn.shape[2], device=logits_BKn.device)
            group_BP = group_BP.expand(tokens.batch, -1)
        else:
            group_BP = (tokens.reduction.groups_BN[:, prefix:] - prefix).clamp_min(-1)
        if "canvas" not in state:
            B, K, _ = logits_BKn.shape
            state["canvas"] = logits_BKn.new_full((B, K, group_BP.shape[1]), -torch.inf)
            state["stage"] = torch.full_like(group_BP, -1)
        state["canvas"] = update_canvas(state["canvas"], logits_BKn, group_BP)
        state["stage"] = state["stage"].masked_fill(group_BP >= 0, stage)

    def _publish(self, class_BK2: torch.Tensor, context: EncoderContext) -> None:
        """Hand the canvas to the user."""
        state = context.state
        side = round(state["canvas"].shape[2] ** 0.5)
        plane = context.plane or (side, side)
        context.predict(
            DensePrediction(
                self.name, state["canvas"], class_BK2, state["stage"], plane, state["flops"]
            )
        )

    def _heads(self, device: torch.device) -> tuple[MaskHead, ...]:
        if self.heads:
            return self.heads
        self.check(None, None)
        assert self.weights is not None
        path = Path(self.weights).expanduser().resolve()
        return self._checked(_load(path, path.stat().st_mtime_ns, self.num_heads, device))

    def _checked(self, heads: tuple[MaskHead, ...]) -> tuple[MaskHead, ...]:
        if len(heads) != len(self.after) + 1:
            raise ValueError(
                f"after = {self.after} and the end make {len(self.after) + 1} stages; there are "
                f"{len(heads)} heads."
            )
        if len({head.num_classes for head in heads}) > 1:
            raise ValueError(
                f"All heads predict the same classes; these have "
                f"{[head.num_classes for head in heads]}."
            )
        return heads
