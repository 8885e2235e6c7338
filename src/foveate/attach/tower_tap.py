"""Hooks that read the attention of single encoder blocks, and what becomes of it per visual item.

Legend: B images, tiles or frames of a call, H heads, N tokens of one of them, I images of an item,
P patches.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn

from foveate.attach.encoder_joining import view_of_images
from foveate.attach.single import OfOneModel
from foveate.core import EncoderAttentionView, Method, Reduction
from foveate.errors import AttachmentError
from foveate.models.tower import VisionTower

CLS, RECEIVED = "encoder.cls_attention", "encoder.received_attention"
#: Signals that are summed up in the encoder, so that no query or key outlives its block.
ENCODER_SIGNALS = (CLS, RECEIVED)


class Shortened(Protocol):
    """An encoder stage in the middle of a call."""

    def sizes(self) -> torch.Tensor | None:
        """How many tokens each present one stands for, where attention weighs by it."""

    def present(self) -> Reduction | None:
        """From all tokens of an image to the present ones; None when all are there."""

    def images_in_a_row(self) -> int:
        """Frames of a video that were joined into one row."""
        ...


@dataclass(frozen=True)
class BlockReads:
    """What a recipe reads of one encoder block.

    Attributes:
        signals: names among `ENCODER_SIGNALS`.
        keep: queries and keys are kept for the projector stage.
        values: so are the values.
    """

    signals: tuple[str, ...] = ()
    keep: bool = False
    values: bool = False


def block_reads(
    tower: VisionTower, methods: Iterable[Method], signals: Iterable[str]
) -> dict[int, BlockReads]:
    """What projector-stage methods read of an encoder, by block.

    Args:
        tower: the encoder.
        methods: the methods, for the blocks that they declare.
        signals: names of signals; those of the encoder are read from its feature block.

    Raises:
        AttachmentError: a method reads a block that does not exist.
    """
    names = tuple(name for name in ENCODER_SIGNALS if name in set(signals))
    reads = {tower.feature_block: BlockReads(names)} if names else {}
    depth = len(tower.blocks)
    for method in methods:
        for layer in method.encoder_layers(depth, tower.feature_block):
            if not 0 <= layer < depth:
                raise AttachmentError(
                    f"{method.name} reads encoder block {layer}; this encoder has {depth}."
                )
            known = reads.get(layer, BlockReads())
            values = known.values or method.reads_values
            reads[layer] = replace(known, keep=True, values=values)
    return reads


class TowerTap(OfOneModel):
    """Hooks that hand the projections of one block to an observer.

    The observer is called right after the block's attention, before anything else in the block.

    Args:
        tower: where to hook.
        block: index of the block.
        observe: gets the outputs of the tapped modules and the keyword arguments of the attention.
        values: tap the values, too.
    """

    def __init__(
        self,
        tower: VisionTower,
        block: int,
        observe: Callable[[dict[str, torch.Tensor], dict[str, Any]], None],
        values: bool = False,
    ) -> None:
        self._local = threading.local()
        self.observe = observe
        attention = tower.attentions[block]
        self.handles = [
            attention.register_forward_pre_hook(self._before, with_kwargs=True),
            attention.register_forward_hook(self._after),
        ]
        taps = tower.qk_taps(block) | (tower.v_taps(block) if values else {})
        for name, module in taps.items():
            self.handles.append(module.register_forward_hook(functools.partial(self._tap, name)))

    def so_far(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What the observer is going to get, while the attention is still running."""
        return self._local.captured, self._local.kwargs

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._local.captured, self._local.kwargs = {}, kwargs

    def _tap(self, name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self._local.captured[name] = output

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        captured, kwargs = self._local.captured, self._local.kwargs
        self._local.captured, self._local.kwargs = {}, {}
        self.observe(captured, kwargs)


@dataclass(frozen=True, eq=False)
class ItemEncoder:
    """The encoder as it ran on one visual item.

    Attributes:
        num_layers: its blocks.
        feature_layer: index of the block that made the features.
        view: gives the attention of a block that was kept, else None.
    """

    num_layers: int
    feature_layer: int
    view: Callable[[int], EncoderAttentionView | None]


def attention_view(
    tower: VisionTower,
    block: int,
    captured: Mapping[str, torch.Tensor],
    attention_kwargs: Mapping[str, Any],
    stage: Shortened | None = None,
    values: bool = False,
) -> EncoderAttentionView:
    """The attention that a `TowerTap` has just seen, of all images of the call.

    A packed tower gives one image with all patches of the call, its windows being the segments.
    """
    q_BHND, k_BHND = tower.assemble_qk(block, captured, attention_kwargs)
    segments = tower.segments(block, attention_kwargs)
    view = EncoderAttentionView(
        q_BHND,
        k_BHND,
        tower.assemble_v(block, captured) if values else None,
        tower.num_prefix,
        tower.has_cls,
        None if segments is None else tuple(segments.tolist()),
        size_IM=None if stage is None else stage.sizes(),
        reduction=None if stage is None else stage.present(),
    )
    return view if stage is None else view_of_images(view, stage.images_in_a_row())


def signal_map(
    view: EncoderAttentionView, name: str, grid_thw: Sequence[tuple[int, int, int]] = ()
) -> torch.Tensor:
    """One of `ENCODER_SIGNALS` for all images of a call, float32 [B, P].

    Args:
        view: the block that made the features.
        name: which signal.
        grid_thw: (frames, rows, columns) per item of a packed encoder, whose map is [1, P].
    """
    if name == CLS:
        return view.cls()
    if not grid_thw:
        return view.received(keys="patches")
    parts, start = [], 0
    for frames, rows, columns in grid_thw:
        part_TP = view.frames(start, frames, rows * columns).received()
        parts.append(part_TP.flatten())
        start += part_TP.numel()
    return torch.cat(parts)


def item_views(
    calls: Sequence[EncoderAttentionView],
    planes: Sequence[Sequence[int]],
    grid_thw: Sequence[tuple[int, int, int]],
    token_scores: Callable[[torch.Tensor], list[torch.Tensor]],
) -> list[EncoderAttentionView]:
    """One view per visual item of a feature call.

    Args:
        calls: the block in every call of the encoder that the feature call made.
        planes: per item, the plane of its grid that each of its images belongs to.
        grid_thw: (frames, rows, columns) in patches, in order, where the encoder is packed.
        token_scores: carries scores of all patches of the feature call to the tokens of each item.

    Raises:
        ValueError: the items do not have as many images as the encoder got.
    """
    # One number per image: its patches. Images of one item are of one size and one encoder call.
    lengths = [rows * columns for frames, rows, columns in grid_thw for _ in range(frames)]
    if not grid_thw:
        lengths = [view.num_patches for view in calls for _ in range(view.num_images)]
    expected = sum(map(len, planes))
    if expected != len(lengths):
        raise ValueError(
            f"The items of this call have {expected} images, the encoder got {len(lengths)}."
        )
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    call_starts = [0]
    for view in calls:
        call_starts.append(call_starts[-1] + view.num_images * view.num_patches)
    views, image = [], 0
    for item, item_planes in enumerate(planes):
        num, length, start = len(item_planes), lengths[image], starts[image]
        call = next(i for i, (_, stop) in enumerate(pairwise(call_starts)) if start < stop)
        view, offset = calls[call], start - call_starts[call]
        if grid_thw:
            view = view.frames(offset, num, length)
        else:
            view = view.images(offset // length, offset // length + num)
        carry = functools.partial(_carry, token_scores, starts[-1], start, item)
        views.append(replace(view, planes=tuple(item_planes), token_map=carry))
        image += num
    return views


def _carry(
    token_scores: Callable[[torch.Tensor], list[torch.Tensor]],
    total: int,
    start: int,
    item: int,
    map_IN: torch.Tensor,
) -> torch.Tensor:
    """A map of one item's patches as its tokens have it, float32 [1, N']."""
    # Items do not mix, so the others' patches may hold anything.
    score_P = map_IN.new_zeros(total)
    score_P[start : start + map_IN.numel()] = map_IN.flatten()
    return token_scores(score_P)[item][None]
