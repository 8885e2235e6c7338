"""HoT: a 3D pose transformer goes on with representative frames and recovers all of them.

Legend: B sequences, F frames, K frames kept, J joints, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from foveate import ops
from foveate.core import (
    BackboneContext,
    BackboneMethod,
    Budget,
    Card,
    EncoderContext,
    Reduction,
    Tokens,
    backbone_context,
    relative_layer,
)
from foveate.methods._pose_loss import pose_loss

__all__ = ["HoT", "choose_frames", "pose_loss"]

Variant = Literal["seq2seq", "seq2frame"]
Recovery = Literal["auto", "attention", "interpolate"]


def choose_frames(
    token_BFC: torch.Tensor,
    keep: int,
    *,
    neighbours: int = 2,
    centre: int | None = None,
    generator: torch.Generator | None = None,
    noise_BF: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token pruning cluster: the frames that are density peaks, int64 [B, keep], ascending.

    Args:
        token_BFC: one token per frame (the mean of its joints).
        keep: frames kept, the centre included.
        neighbours: of the density, the frame itself included.
        centre: a frame that stays whatever its score; None: no such frame.
        generator: adds noise of 1e-6 to the densities, as the released code does.
        noise_BF: uniform numbers in [0, 1) for it instead.

    Raises:
        ValueError: `keep` is out of range.

    Example:
        >>> pose = torch.tensor([0.0, 0.0, 0.0, 0.3, 0.4, 0.9])[None, :, None]
        >>> choose_frames(pose, 3).tolist()
        [[0, 3, 5]]

    Source: HoT, section 3.2 (arXiv 2311.12028).
    """
    num_frames = token_BFC.shape[1]
    if not 1 <= keep <= num_frames:
        raise ValueError(f"keep must be between 1 and {num_frames} frames, got {keep}.")
    score_BF = ops.density_peak_scores(
        token_BFC, neighbours, generator=generator, noise_BN=noise_BF
    )
    if centre is None:
        return ops.top_k(score_BF, keep)
    # The one that stays is first in the ranking, so that K - 1 others follow it.
    return ops.top_k(score_BF.index_fill(1, score_BF.new_tensor([centre]).long(), torch.inf), keep)


@dataclass(frozen=True)
class HoT(BackboneMethod):
    """Hourglass Tokenizer: after some blocks only representative frames go on; all come back.

    Frames are chosen by density-peak clustering of their mean joints. A model with the trained
    parts (`MixSTEConfig.slots`) adds its slot embedding and recovers all frames by attention from
    learned queries; without them the recovery is linear interpolation in time, which is ours and
    needs no training.

    Args:
        layer: pair of blocks in front of which frames leave; a number or a fraction of the depth.
        neighbours: of the density, the frame itself included.
        variant: "seq2seq" gives all frames; "seq2frame" keeps the centre frame, and gives the
            frames that are left.
        recovery: "attention" (trained), "interpolate" (ours), or "auto": what the model has.
        jitter: break ties by noise of the seed, as the released code does without one; by default
            the earlier frame wins.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget
        >>> HoT().count_frames(243, Budget(retain=1 / 3)), HoT().cuts(8)
        (81, (3,))

    Source: arXiv 2311.12028; details from the released code.
    """

    layer: int | float = 3 / 8
    neighbours: int = 2
    variant: Variant = "seq2seq"
    recovery: Recovery = "auto"
    jitter: bool = False

    card: ClassVar[Card] = Card(
        name="hot",
        title="HoT",
        paper="Hourglass Tokenizer for Efficient Transformer-Based 3D Human Pose Estimation",
        arxiv="2311.12028",
        year=2024,
        url="https://github.com/NationalGAILab/HoT",
        licence="MIT",
        stages=("encoder",),
        kind="trained",
        summary="Goes on with the frames of a pose sequence that are density peaks, and recovers "
        "all frames behind the last block.",
        defaults={
            "HoT on MixSTE, 243 frames": "81 frames from pair 3 of 8",
            "HoT on MotionBERT, 243 frames": "81 frames from block 1 of 5 (layer=1)",
            "TPC on MixSTE, 243 frames": '61 frames from pair 7 of 8 (layer=7, "seq2frame")',
            "TPC on MHFormer, 351 frames": "117 frames from block 1 of 3",
        },
        headline=(
            "Human3.6M, GFLOPs and error in mm (read off a plot): MixSTE 277 and 40.9 to 167 and "
            "41.0; MotionBERT 131 and 39.8 to 63 and 39.8",
        ),
        notes=(
            "Runs on MixSTE (foveate.models.backbones), which takes the published weights.",
            "The released code breaks ties by noise in evaluation, too; here the earlier frame "
            "wins, and jitter=True draws the noise by the seed.",
            "Ours: without trained parts, recovery by linear interpolation between kept frames.",
            "The slot embedding fits one number of frames: with trained parts, keep as many.",
            "For the flipped copy of test-time augmentation the released code reuses the frames of "
            "the original; here every call chooses its own.",
        ),
        retain=1 / 3,
    )
    kind: ClassVar = "pose"

    def __post_init__(self) -> None:
        for name, options in (("variant", Variant), ("recovery", Recovery)):
            if getattr(self, name) not in get_args(options):
                choices = ", ".join(map(repr, get_args(options)))
                raise ValueError(f"{name} must be {choices}, got {getattr(self, name)!r}.")
        if isinstance(self.neighbours, bool) or self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1 frame, got {self.neighbours!r}.")
        if not self.layer > 0:
            raise ValueError(f"layer must be above 0 (a pair has run before), got {self.layer}.")

    def cuts(self, num_blocks: int) -> tuple[int, ...]:
        """The pair in front of which frames leave."""
        return (max(1, relative_layer(self.layer, num_blocks)),) if num_blocks > 1 else ()

    def count_frames(self, num_frames: int, budget: Budget) -> int:
        """Frames that stay, at least 1."""
        return max(1, min(num_frames, budget.count(num_frames)))

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Choose the frames; tokens [B, F, C] are means over joints."""
        num_frames = tokens.num_tokens
        keep = self.count_frames(num_frames, context.budget)
        if keep == num_frames:
            return None
        index_BK = choose_frames(
            tokens.x_BND,
            keep,
            neighbours=self.neighbours,
            centre=(num_frames - 1) // 2 if self.variant == "seq2frame" else None,
            generator=context.generator() if self.jitter else None,
        )
        context.note(
            "cluster", lambda: ops.nearest_centre(tokens.x_BND, index_BK), "label", "kept frame"
        )
        return Reduction.select(index_BK, num_frames)

    def settle(self, x: torch.Tensor, context: BackboneContext) -> torch.Tensor:
        """Add the slot embedding to what is left, [B, K, J, C]."""
        trained = self._trained(context, x.shape[1])
        return x if trained is None else x + trained["slot_embedding"][:, :, None]

    def recover(
        self, x: torch.Tensor, reduction: Reduction, context: BackboneContext
    ) -> torch.Tensor | None:
        """All frames, [B, K, J, C] -> [B, F, J, C]."""
        if self.variant == "seq2frame":
            return None
        trained = self._trained(context, x.shape[1])
        if trained is None:
            return ops.interpolate_places(x, reduction.anchor_BM, reduction.num_in)
        B, J = x.shape[0], x.shape[2]
        query_NFC = trained["frame_queries"].expand(B * J, -1, -1)
        x_NKC = x.transpose(1, 2).flatten(0, 1)
        found_NFC = ops.cross_attention(query_NFC, x_NKC, trained, trained["num_heads"])
        return (query_NFC + found_NFC).unflatten(0, (B, J)).transpose(1, 2)

    def _trained(self, context: BackboneContext, kept: int) -> dict[str, Any] | None:
        """The trained parts that fit; None: this model goes on without."""
        if self.variant == "seq2frame" or self.recovery == "interpolate":
            return None
        trained = backbone_context(self, context).signal("recovery")
        if trained is None:
            if self.recovery == "auto":
                return None
            raise ValueError(
                'hot(recovery="attention") needs a model with trained parts (MixSTEConfig.slots); '
                'this one has none: use recovery="interpolate".'
            )
        slots = trained["slot_embedding"].shape[1]
        if slots != kept:
            raise ValueError(
                f"This model was trained to keep {slots} frames and {kept} are asked for: pass "
                f'tokens={slots}, or recovery="interpolate" to do without the trained parts.'
            )
        return trained
