"""A vision encoder on its own: load it, run frames through it, read the signals methods need.

Legend: T frames, P patches of a frame, N = P + prefix tokens, C channels, H, W pixels.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attach.encoder import EncoderRun, EncoderStage
from foveate.attach.tower_tap import (
    CLS,
    RECEIVED,
    TowerTap,
    attention_view,
    block_reads,
    signal_map,
)
from foveate.checkpoints.sources import check_checkpoint
from foveate.core import Budget, EncoderAttentionView, Method
from foveate.errors import FoveateError, UnknownModelError
from foveate.models import adapter_for
from foveate.models.default_encoder import default_encoder, default_encoder_path
from foveate.models.encoders import EncoderAdapter
from foveate.models.tower import VisionTower
from foveate.video import FrameTransform

#: DINOv2 patches are 14 pixels: 27 x 27 of them, the grid of SigLIP in LLaVA-OneVision.
DEFAULT_SIZE = 378


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder with the preprocessing that belongs to it.

    Attributes:
        model: a transformers model that is, or holds, a vision encoder of a known family.
        transform: frames to its input.
        name: for people.
    """

    model: nn.Module
    transform: FrameTransform
    name: str = ""

    @property
    def tower(self) -> VisionTower:
        """Where its blocks are.

        Raises:
            FoveateError: the model is no encoder of a known family.
        """
        adapter = adapter_for(self.model)
        if not isinstance(adapter, EncoderAdapter):
            raise UnknownModelError(
                f"{type(self.model).__name__} is a multimodal model, not an encoder alone: use "
                "`foveate ask`, or name one of the families vit, deit, dinov2, clip, siglip."
            )
        return adapter.tower(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def shown(self, pixels_TCHW: Tensor) -> Tensor:
        """The part of the frames that the encoder sees, uint8: what its patches can be drawn on."""
        if self.transform.crop_size is None:
            return pixels_TCHW
        plain = replace(self.transform, rescale_factor=None, mean=None, std=None)
        return plain(pixels_TCHW).clamp(0, 255).round().to(torch.uint8)


def load_encoder(
    name: str | Path | None = None,
    *,
    size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load a vision encoder and its preprocessing.

    Args:
        name: folder or hub id of a transformers checkpoint of ViT, DeiT, DINOv2, CLIP or SigLIP;
            None takes the embedded DINOv2-small.
        size: pixels of the square that frames are scaled to, a multiple of the patch size; None
            follows the checkpoint's own preprocessing (the embedded encoder: 378, which gives the
            27 x 27 patches of LLaVA-OneVision).
        device: where to put it.
        dtype: of its weights.

    Raises:
        FoveateError: the checkpoint cannot be read or is of another kind.
        ValueError: the size is no multiple of the patch size.
    """
    if name is None:
        model = default_encoder(device=device, dtype=dtype)
        config = json.loads((default_encoder_path() / "preprocessor_config.json").read_text())
        encoder = Encoder(model, FrameTransform.from_processor(config), "DINOv2-small (embedded)")
        return _at_size(encoder, size or DEFAULT_SIZE)
    from transformers import AutoConfig, AutoModel

    check_checkpoint(name)
    with _readable(name):
        config = AutoConfig.from_pretrained(name)
    if _has_language_model(config):
        raise UnknownModelError(
            f"{name} is a multimodal model ({config.model_type}), not an encoder alone: use "
            "`foveate ask`, or name an encoder of the families vit, deit, dinov2, clip, siglip."
        )
    with _readable(name):
        model = AutoModel.from_pretrained(name, dtype=dtype).eval().to(device)
    encoder = Encoder(model, _transform(name, config), str(name))
    _ = encoder.tower  # refuses other kinds now, before anything is decoded
    return encoder if size is None else _at_size(encoder, size)


class _readable:
    """Turns what `from_pretrained` raises into one sentence."""

    def __init__(self, name: str | Path) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError, KeyError)) and not isinstance(
            error, FoveateError
        ):
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UnknownModelError(f"cannot load {self.name}: {first}") from error


def _has_language_model(config: Any) -> bool:
    is_pair = config.model_type in ("clip", "siglip")
    return not is_pair and getattr(config, "text_config", None) is not None


def _transform(name: str | Path, config: Any) -> FrameTransform:
    """Preprocessing of a checkpoint; without a file for it, its image size and plain statistics."""
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(name)
    except OSError:
        vision = getattr(config, "vision_config", None) or config
        side = int(getattr(vision, "image_size", 224))
        half = (0.5, 0.5, 0.5)
        return FrameTransform(size={"height": side, "width": side}, mean=half, std=half)
    return FrameTransform.from_processor(settings)


def _at_size(encoder: Encoder, size: int) -> Encoder:
    patch = encoder.tower.patch_size
    if size < max(patch) or size % patch[0] or size % patch[1]:
        near = max(1, round(size / patch[0])) * patch[0]
        raise ValueError(
            f"size {size} is no multiple of the encoder's patches of {patch[0]} pixels; try {near}."
        )
    square = replace(encoder.transform, size={"height": size, "width": size}, crop_size=None)
    return replace(encoder, transform=square)


@dataclass(eq=False)
class Encoded:
    """Frames as the encoder sees them.

    Attributes:
        x_TPC: features of the patches.
        shape: (rows, columns) of a frame's patches.
        scores: signal name -> float32 [T, P].
        runs: what encoder-stage methods did, one entry per batch.
        views: block -> its attention, of the blocks that a method reads.
    """

    x_TPC: Tensor
    shape: tuple[int, int]
    scores: dict[str, Tensor] = field(default_factory=dict)
    runs: list[EncoderRun] = field(default_factory=list)
    views: dict[int, EncoderAttentionView] = field(default_factory=dict)


class EncoderPass:
    """Runs frames through an encoder, batch by batch, with hooks that are taken off on leaving.

    Args:
        encoder: the encoder.
        signals: names of the encoder signals wanted; those it does not have are left out.
        steps: encoder-stage methods, (number, method).
        budgets: budget of every step of the recipe, by number.
        readers: projector-stage methods, for the encoder blocks that they read.
        gates: patches-stage methods, (number, method); every batch is a clip to them.
    """

    def __init__(
        self,
        encoder: Encoder,
        signals: Iterable[str] = (),
        steps: Sequence[tuple[int, Method]] = (),
        budgets: Sequence[Budget] = (),
        readers: Sequence[Method] = (),
        gates: Sequence[tuple[int, Method]] = (),
    ) -> None:
        self.encoder = encoder
        self.tower = encoder.tower
        offered = {RECEIVED, *([CLS] if self.tower.has_cls else [])}
        self.reads = block_reads(self.tower, readers, offered & set(signals))
        self.parts: list[Encoded] = []
        self._scores: dict[str, Tensor] = {}
        self._views: dict[int, list[EncoderAttentionView]] = {}
        self._runs: list[EncoderRun] = []
        self._handles: list[Any] = []
        self._stage: EncoderStage | None = None
        if steps or gates:
            # Restored, because what follows (pooling, a projector) works on whole grids.
            self._stage = EncoderStage(
                self.tower,
                list(steps),
                lambda i: budgets[i],
                True,
                self._runs.append,
                evidence=True,
                gates=gates,
            )

    def __enter__(self) -> EncoderPass:
        try:
            if self._stage is not None:
                self._stage.install(self._handles)
            for block, reads in self.reads.items():
                observe = functools.partial(self._observe, block)
                self._handles += TowerTap(self.tower, block, observe, reads.values).handles
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add(self, pixels_TCHW: Tensor) -> None:
        """Encode one batch of uint8 frames [T, 3, H, W]."""
        encoder, module = self.encoder, self.tower.module
        x_TCHW = encoder.transform(pixels_TCHW.to(encoder.device), dtype=encoder.dtype)
        options = {}
        if "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
            native = getattr(module.config, "image_size", None)
            native = native if isinstance(native, (tuple, list)) else (native, native)
            if tuple(x_TCHW.shape[-2:]) != tuple(native):
                options["interpolate_pos_encoding"] = True
        with torch.inference_mode():
            output = module(pixel_values=x_TCHW, **options)
        patch = self.tower.patch_size
        shape = (x_TCHW.shape[-2] // patch[0], x_TCHW.shape[-1] // patch[1])
        x_TPC = output.last_hidden_state[:, self.tower.num_prefix :]
        self.parts.append(Encoded(x_TPC, shape, self._scores))
        self._scores = {}

    def result(self) -> Encoded:
        """All batches together."""
        names = self.parts[0].scores
        return Encoded(
            torch.cat([part.x_TPC for part in self.parts]),
            self.parts[0].shape,
            {name: torch.cat([part.scores[name] for part in self.parts]) for name in names},
            self._runs,
            {block: EncoderAttentionView.join(views) for block, views in self._views.items()},
        )

    def _observe(self, block: int, captured: dict[str, Tensor], kwargs: dict[str, Any]) -> None:
        reads = self.reads[block]
        with torch.no_grad():
            view = attention_view(self.tower, block, captured, kwargs, self._stage, reads.values)
            self._scores.update({name: signal_map(view, name) for name in reads.signals})
        if reads.keep:
            self._views.setdefault(block, []).append(view)
