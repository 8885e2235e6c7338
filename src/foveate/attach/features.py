"""What the vision side of a call offers: layouts, encoder signals and pixels, per visual item.

The feature methods of a model (`get_image_features`, `get_video_features`) are no modules, so hooks
cannot see them; they are wrapped on the instance, and the instance attribute is deleted again on
removal. Everything else here is a forward hook.

Legend: N tokens of an item.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from foveate.attach.noting import TokenMaps, encoder_evidence
from foveate.attach.single import OfOneModel
from foveate.attach.tower_tap import (
    BlockReads,
    ItemEncoder,
    Shortened,
    TowerTap,
    attention_view,
    item_views,
    signal_map,
)
from foveate.core import EncoderAttentionView, Evidence, Grid, Modality
from foveate.models.adapter import Adapter
from foveate.models.tower import VisionTower


@dataclass(eq=False)
class FeatureRecord:
    """One call of a feature method.

    Attributes:
        modality: "image" or "video".
        grids: one per item, in placeholder order.
        signals: name -> one float32 [N_i] per item.
        pixels: gives uint8 frames per item, for pictures.
        tower_inputs: (images, tokens per image) of every call of the encoder, prefix included;
            (1, all tokens) of a packed encoder.
        grid_thw: (frames, rows, columns) in patches per item of a packed encoder.
        num_prefix: prefix tokens per image.
        shrinks_itself: the encoder merges neighbours before the projector sees them.
        tower: the encoder that ran.
        views: block -> its attention in every call of the encoder, of the blocks that are kept.
        items: block -> the same, one view per item, made at the first reading.
        encoder_runs: what encoder-stage methods did in this call.
        carried: by step number and name: what they carried, one float32 [N_i] per item.
        layouts: gives, for every image the encoder gets, the grid of its item and its plane there.
        token_maps: carries values of all patches of the call to the tokens of each item.
    """

    modality: Modality
    grids: list[Grid] = field(default_factory=list)
    signals: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    pixels: Callable[[], list[torch.Tensor]] | None = None
    tower_inputs: list[tuple[int, int]] = field(default_factory=list)
    grid_thw: list[tuple[int, int, int]] = field(default_factory=list)
    num_prefix: int = 0
    shrinks_itself: bool = False
    scores: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    encoder_runs: list[Any] = field(default_factory=list)
    carried: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)
    layouts: Callable[[], list[tuple[Grid, int]]] = list
    token_maps: TokenMaps = lambda score_P: []
    tower: VisionTower | None = None
    views: dict[int, list[EncoderAttentionView]] = field(default_factory=dict)
    items: Callable[[int], list[EncoderAttentionView]] = lambda block: []

    def evidence(self) -> list[list[Evidence]]:
        """What encoder-stage methods noted, for the tokens of each item."""
        return encoder_evidence(self.encoder_runs, self.token_maps, len(self.grids))

    def item(self, index: int) -> ItemEncoder | None:
        """What the projector stage may read of the encoder for one item."""
        tower = self.tower
        if tower is None:
            return None

        def view(block: int) -> EncoderAttentionView | None:
            return self.items(block)[index] if block in self.views else None

        return ItemEncoder(len(tower.blocks), tower.feature_block, view)


def carried_maps(
    runs: Sequence[Any], token_maps: TokenMaps
) -> dict[tuple[int, str], list[torch.Tensor]]:
    """What encoder-stage methods carried in all calls of an encoder, for the tokens of each item.

    Args:
        runs: the `EncoderRun` of every call, in order; they let go of it.
        token_maps: carries values of all patches of the calls to the tokens of each item.
    """
    names = set(runs[0].carried).intersection(*(run.carried for run in runs)) if runs else set()
    maps = {
        key: list(token_maps(torch.cat([run.carried[key].flatten() for run in runs])))
        for key in sorted(names)
    }
    for run in runs:
        run.carried = {}
    return maps


class FeatureWatch(OfOneModel):
    """Records every call of the feature methods of one model.

    Args:
        model: the model.
        adapter: its adapter.
        reads: what the recipe reads of the blocks of each encoder, by block.
        shortened: the running encoder stage, if one may have shortened the sequence.
        active: whether anything is to be reduced at the moment; if not, nothing is recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        reads: Callable[[VisionTower], dict[int, BlockReads]],
        shortened: Callable[[], Shortened | None],
        active: Callable[[], bool],
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.reads = reads
        self.shortened = shortened
        self.active = active
        self.base = adapter.base(model)
        self.towers = adapter.towers(model)
        self._local = threading.local()
        self._replaced: dict[str, Any] = {}
        self._kept: dict[int, tuple[weakref.ref, FeatureRecord]] = {}

    # -- state of the running call --------------------------------------------------------------

    @property
    def current(self) -> FeatureRecord | None:
        """The record of the feature method that is running in this thread."""
        return getattr(self._local, "current", None)

    def layouts(self) -> Sequence[tuple[Grid, int]]:
        """For every image of the running call of the encoder, its item's grid and its plane."""
        record = self.current
        if record is None:
            return ()
        first = sum(images for images, _ in record.tower_inputs[:-1])
        return record.layouts()[first : first + record.tower_inputs[-1][0]]

    def begin(self, outputs: Mapping[str, Any]) -> None:
        """A call of the model starts; `outputs` are features computed earlier, by modality.

        Records of features that this call does not use are forgotten.
        """
        kept = {modality: self._kept.get(id(output)) for modality, output in outputs.items()}
        self._local.pending = {name: found[1] for name, found in kept.items() if found is not None}

    def take(self) -> dict[str, FeatureRecord]:
        """The records of the running call, by modality."""
        pending = getattr(self._local, "pending", {})
        self._local.pending = {}
        return pending

    # -- installing -----------------------------------------------------------------------------

    def install(self, handles: list[Any]) -> None:
        """Wrap the feature methods and hook the encoders; adds the hooks to `handles`."""
        for modality, name in self.adapter.feature_methods.items():
            if hasattr(self.base, name):
                self._wrap(cast("Modality", modality), name)
        for tower in {id(t): t for t in self.towers.values()}.values():
            handles.append(tower.blocks[0].register_forward_pre_hook(self._note_shape(tower)))
            if tower.packed:
                hook = self._note_grid
                handles.append(tower.module.register_forward_pre_hook(hook, with_kwargs=True))
            for block, reads in self.reads(tower).items():
                observe = self._on_attention(tower, block, reads)
                handles += TowerTap(tower, block, observe, reads.values).handles

    def uninstall(self) -> None:
        """Put the instance's attributes back as `install` found them."""
        for name, previous in self._replaced.items():
            if previous is None:
                self.base.__dict__.pop(name, None)
            else:
                self.base.__dict__[name] = previous
        self._replaced.clear()
        self._kept.clear()

    def _wrap(self, modality: Modality, name: str) -> None:
        original = getattr(self.base, name)
        # Of the class: something else may have wrapped the method of the instance before.
        signature = inspect.signature(getattr(type(self.base), name).__get__(self.base))

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            # Some video methods call the image method of the same instance: the outer one counts.
            if self.current is not None or not self.active():
                return original(*args, **kwargs)
            record = FeatureRecord(modality)
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            arguments.update(arguments.pop("kwargs", {}))
            # Asked for by few methods, in the middle of the call.
            record.layouts = functools.cache(lambda: self._layouts(modality, arguments))
            self._local.current = record
            try:
                output = original(*args, **kwargs)
            finally:
                self._local.current, record.layouts = None, list
            self._finish(record, arguments, output)
            return output

        self._replaced[name] = self.base.__dict__.get(name)
        self.base.__dict__[name] = watched

    def _layouts(self, modality: Modality, arguments: Mapping[str, Any]) -> list[tuple[Grid, int]]:
        grids = self.adapter.grids(self.model, modality, arguments, None)
        planes = self.adapter.encoder_planes(self.model, modality, arguments, grids)
        return [
            (grid, plane)
            for grid, item_planes in zip(grids, planes, strict=True)
            for plane in item_planes
        ]

    def _finish(self, record: FeatureRecord, arguments: Mapping[str, Any], output: Any) -> None:
        # The maps are read later, when a watch that encodes ahead may have been given another one.
        adapter = self.adapter
        features = getattr(output, "pooler_output", None)
        if features is None:
            features = output[1] if isinstance(output, tuple) and len(output) > 1 else output
        grids = adapter.grids(self.model, record.modality, arguments, features)
        record.grids = grids
        given = (self.model, record.modality)

        def token_scores(score_P: torch.Tensor) -> list[torch.Tensor]:
            return adapter.token_scores(*given, score_P, arguments, grids)

        record.token_maps = token_scores
        for name, parts in record.scores.items():
            record.signals[name] = token_scores(torch.cat(parts))
        record.scores = {}
        record.carried = carried_maps(record.encoder_runs, token_scores)

        # Not through the record, which would then hold itself, and its queries, until collected.
        views, grid_thw = record.views, record.grid_thw

        @functools.cache
        def items(block: int) -> list[EncoderAttentionView]:
            planes = adapter.encoder_planes(*given, arguments, grids)
            return item_views(views[block], planes, grid_thw, token_scores)

        record.items = items
        record.pixels = functools.partial(
            adapter.pixels, self.model, record.modality, arguments, record.grids
        )
        pending = getattr(self._local, "pending", {})
        self._local.pending = {**pending, record.modality: record}
        self._keep(output, record)

    def _keep(self, output: Any, record: FeatureRecord) -> None:
        """Remember what features belong to, so that they can be passed in again and again."""
        key = id(output)
        try:
            reference = weakref.ref(output, lambda _: self._kept.pop(key, None))
        except TypeError:  # tuples, which only the call that made them can use
            return
        self._kept[key] = (reference, record)

    def _note_shape(self, tower: VisionTower) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            record = self.current
            if record is not None and args:
                shape = args[0].shape
                record.tower_inputs.append((1, shape[0]) if tower.packed else tuple(shape[:2]))
                record.num_prefix, record.tower = tower.num_prefix, tower

        return hook

    def _note_grid(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        record = self.current
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        if record is not None and grid is not None:
            record.grid_thw += [tuple(row) for row in grid.tolist()]
            record.shrinks_itself = "merge_sizes" in kwargs

    def _on_attention(
        self, tower: VisionTower, block: int, reads: BlockReads
    ) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
        def observe(captured: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> None:
            record = self.current
            if record is None:
                return
            with torch.no_grad():
                stage = self.shortened()
                view = attention_view(tower, block, captured, kwargs, stage, reads.values)
                for name in reads.signals:
                    score = signal_map(view, name, record.grid_thw)
                    record.scores.setdefault(name, []).append(score)
                if reads.keep:
                    record.views.setdefault(block, []).append(view)

        return observe
