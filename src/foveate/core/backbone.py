"""Methods of backbones that are no vision transformers: what they declare, read and may do.

Legend: B samples, N places of the full sequence, K tokens that are left, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from foveate.core.context import EncoderContext
from foveate.core.method import Method
from foveate.core.reduction import Reduction
from foveate.errors import AttachmentError

#: "pose": frames of joints; "ssm": patches that are scanned; "s4": tokens of a video, convolved.
BackboneKind = Literal["pose", "ssm", "s4"]

#: What methods can read of a backbone, by name.
BACKBONE_SIGNALS: Mapping[str, str] = {
    "recovery": "pose: HoT's trained parts, a mapping with slot_embedding [1, k, C], frame_queries "
    "[1, N, C], num_heads, and the weights of the recovering attention",
    "scan_outputs": "ssm: gated output of every path of the block that has just run, in token "
    "order, [P, B, K, E]",
    "cls_index": "ssm: index of [CLS] among the tokens that are left; None without one",
    "keep_logits": "s4: logits of keeping and dropping every token, [B, K, 2]",
}


@dataclass(eq=False)
class BackboneContext(EncoderContext):
    """Between two blocks of a backbone, all samples of the call as one batch.

    Attributes:
        kind: which backbone.
        num_source: N, tokens of a sample that entered the first block ([CLS] included).
        left_BK: place of every present token among them, int64 [B, K].
        read: by name, functions that give signals (or None, where this model has none).
    """

    kind: BackboneKind = "pose"
    num_source: int = 0
    left_BK: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    read: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    def signal(self, name: str) -> Any:
        """A signal of `BACKBONE_SIGNALS`, or None where the model has none."""
        if name not in BACKBONE_SIGNALS:
            raise ValueError(f"Unknown signal {name!r}; known: {', '.join(BACKBONE_SIGNALS)}.")
        found = self.read.get(name)
        return None if found is None else found()


@dataclass(frozen=True)
class BackboneMethod(Method):
    """A method of one kind of backbone; its `encoder` is asked between blocks.

    `encoder` gets the tokens [B, K, C] in front of every block that `cuts` names, frames being
    averaged over their joints, and returns what stays.

    Class attributes:
        kind: the kind of backbone it runs on.
        reads_scans: the outputs of the scans of the block in front of every cut are kept for it.
    """

    kind: ClassVar[BackboneKind]
    reads_scans: ClassVar[bool] = False

    @property
    def in_place(self) -> bool:
        """Whether what is dropped is set to zero in a sequence of full length."""
        return False

    @property
    def keeps_gaps(self) -> bool:
        """Whether scans step over what was dropped; otherwise those left become neighbours."""
        return True

    def cuts(self, num_blocks: int) -> Sequence[int]:
        """Blocks in front of which `encoder` is asked, ascending, each in 0 .. num_blocks - 1."""
        raise NotImplementedError

    def settle(self, x: torch.Tensor, context: BackboneContext) -> torch.Tensor:
        """Change what is left right behind a cut, [B, K, ...]; by default nothing."""
        return x

    def recover(
        self, x: torch.Tensor, reduction: Reduction, context: BackboneContext
    ) -> torch.Tensor | None:
        """Full length behind the last block, [B, K, ...] -> [B, N, ...]; None: it stays short."""
        return None

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when a cut does not exist."""
        if num_encoder_layers is not None:
            self.cuts(num_encoder_layers)


def backbone_context(method: Method, context: EncoderContext) -> BackboneContext:
    """The context as that of a backbone.

    Raises:
        AttachmentError: the method was asked on a vision transformer.
    """
    if not isinstance(context, BackboneContext):
        raise AttachmentError(
            f"{method.name} acts between the blocks of a backbone of its own "
            "(foveate.models.backbones), not inside a vision transformer; there, use an "
            'encoder-stage method such as "tome".'
        )
    return context
