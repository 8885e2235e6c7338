"""Adapters of the backbones in `foveate.models.backbones`: MixSTE, Vision Mamba and ViS4mer.

Legend: B samples, N places of the full sequence, K tokens that are left, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from foveate.core.backbone import BackboneKind
from foveate.core.backbone_flops import (
    ConvolutionDims,
    PoseDims,
    ScanDims,
    convolution_flops,
    pose_flops,
    scan_flops,
)
from foveate.core.grid import Grid
from foveate.errors import UnsupportedModelError
from foveate.models.backbones.stream import Stream
from foveate.models.backbones.vision_ssm import places_around_cls
from foveate.models.encoders import EncoderAdapter
from foveate.models.tower import VisionTower

#: By name, functions that give what `foveate.core.backbone.BACKBONE_SIGNALS` lists.
Signals = Mapping[str, Callable[[], Any]]


class Passage(NamedTuple):
    """How many tokens of a sample were where, which its FLOPs depend on.

    Attributes:
        entered: tokens of the full sequence.
        lengths: tokens in front of every block.
        left: tokens behind the last seam.
        read: signals that methods have read, whose making costs something.
    """

    entered: int
    lengths: Sequence[int]
    left: int
    read: Collection[str] = ()


class BackboneAdapter(EncoderAdapter):
    """One backbone: where its seams are, what methods can read there, and what it costs.

    Attributes:
        kind: what methods call it.
        shrinks: blocks shorten the sequence themselves, so that nothing can be brought back.
    """

    kind: ClassVar[BackboneKind]
    shrinks: ClassVar[bool] = False

    def tower(self, model: nn.Module) -> VisionTower:
        """There is none.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"{self.docs_name} is no vision transformer: it has no blocks of attention and MLP "
            "over patches. foveate.reduce attaches its own methods to it."
        )

    def seams(self, model: nn.Module) -> Sequence[nn.Module]:
        """One in front of every block and one behind the last."""
        seams: Any = model.seams
        return list(seams)

    def tap(self, model: nn.Module, block: int) -> nn.Module | None:
        """The module whose output "scan_outputs" gives for a block; None: there is none."""
        return None

    def tokens(self, stream: Stream) -> Tensor:
        """One feature per token, [B, K, C]."""
        return stream.states[0]

    def places(self, model: nn.Module, source_BK: Tensor) -> Tensor:
        """Where in the sequence tokens are that stood at `source_BK` in the full one."""
        return source_BK

    def signals(self, model: nn.Module, stream: Stream, source_BK: Tensor) -> Signals:
        """What a method can read at a seam."""
        return {}

    def item_places(self, model: nn.Module, num_tokens: int) -> Tensor:
        """Places in the full sequence of the tokens that pictures show, in order of the grid."""
        return torch.arange(num_tokens)

    def item_grid(self, model: nn.Module, num_tokens: int) -> Grid:
        """How those lie."""
        return Grid.image(1, num_tokens)

    def flops(self, model: nn.Module, passage: Passage) -> int:
        """FLOPs of one sample."""
        raise NotImplementedError

    @staticmethod
    def config(model: nn.Module) -> Any:
        """The model's configuration."""
        return model.config


class MixSTEAdapter(BackboneAdapter):
    """MixSTE: its tokens are the frames of a pose sequence."""

    family = "mixste"
    model_types: ClassVar = ("mixste",)
    docs_name = "MixSTE"
    kind = "pose"

    def tokens(self, stream: Stream) -> Tensor:
        """The mean of a frame's joints."""
        return stream.states[0].mean(2)

    def signals(self, model: nn.Module, stream: Stream, source_BK: Tensor) -> Signals:
        """HoT's trained parts, where the model has them."""

        def recovery() -> dict[str, Any] | None:
            config = self.config(model)
            if not config.slots:
                return None
            attention: Any = model.cross_attention
            return {
                "slot_embedding": model.pos_embed_token,
                "frame_queries": model.x_token,
                "num_heads": config.heads,
                **dict(attention.named_parameters()),
            }

        return {"recovery": recovery}

    def item_grid(self, model: nn.Module, num_tokens: int) -> Grid:
        """A plane per frame."""
        return Grid.video(num_tokens, 1, 1)

    def flops(self, model: nn.Module, passage: Passage) -> int:
        """FLOPs of one sequence; recovery counts where the trained parts do it."""
        config = self.config(model)
        dims = PoseDims(
            config.pairs,
            config.hidden,
            int(config.hidden * config.mlp_ratio),
            config.joints,
            config.inputs,
            ((config.hidden, config.outputs),),
        )
        entered, lengths, left, read = passage
        attended = "recovery" in read and bool(config.slots) and left == entered
        return pose_flops(dims, entered, lengths, recovered=attended, out_frames=left)


class VisionMambaAdapter(BackboneAdapter):
    """Vision Mamba: patches, with [CLS] in the middle or without."""

    family = "vision_mamba"
    model_types: ClassVar = ("vision_mamba",)
    docs_name = "Vision Mamba"
    kind = "ssm"

    def tap(self, model: nn.Module, block: int) -> nn.Module:
        """Where the gated outputs of all paths pass."""
        layers: Any = model.layers
        return layers[block].mixer.gated

    def places(self, model: nn.Module, source_BK: Tensor) -> Tensor:
        """[CLS] makes room for the patches around it."""
        cls_place: int | None = self.config(model).cls_place
        return source_BK if cls_place is None else places_around_cls(source_BK, cls_place)

    def signals(self, model: nn.Module, stream: Stream, source_BK: Tensor) -> Signals:
        """[CLS] is the middle one of those that are left."""
        middle = None if self.config(model).cls_place is None else stream.num_tokens // 2
        return {"cls_index": lambda: middle}

    def item_places(self, model: nn.Module, num_tokens: int) -> Tensor:
        """The patches."""
        place_N, cls_place = torch.arange(num_tokens), self.config(model).cls_place
        return place_N if cls_place is None else place_N[place_N != cls_place]

    def item_grid(self, model: nn.Module, num_tokens: int) -> Grid:
        """The patches of an image."""
        side = self.config(model).side
        return Grid.image(side, side)

    def flops(self, model: nn.Module, passage: Passage) -> int:
        """FLOPs of one image."""
        config = self.config(model)
        dims = ScanDims(
            config.depth,
            config.hidden,
            config.inner,
            config.state,
            config.rank,
            config.conv,
            config.paths,
            config.channels * config.patch_size**2,
            config.classes,
        )
        return scan_flops(dims, config.side**2, passage.lengths)


class ViS4merAdapter(BackboneAdapter):
    """ViS4mer: tokens of all frames of a video in one sequence."""

    family = "vis4mer"
    model_types: ClassVar = ("vis4mer",)
    docs_name = "ViS4mer"
    kind = "s4"
    shrinks = True

    def signals(self, model: nn.Module, stream: Stream, source_BK: Tensor) -> Signals:
        """What the mask generator says, where the model has one."""
        keep_logits: Any = model.keep_logits
        return {"keep_logits": lambda: keep_logits(stream.states[0])}

    def flops(self, model: nn.Module, passage: Passage) -> int:
        """FLOPs of one video; the mask generator counts where a method has asked it."""
        config = self.config(model)
        dims = ConvolutionDims(config.inputs, config.hidden, config.blocks, config.classes)
        asked = "keep_logits" in passage.read
        return convolution_flops(dims, passage.entered, passage.lengths, asked)
