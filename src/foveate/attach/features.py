"""What the vision side of a call offers: layouts, encoder signals and pixels, per visual item.

The feature methods of a model (`get_image_features`, `get_video_features`) are no modules, so hooks
cannot see them; they are wrapped on the instance, and the instance attribute is deleted again on
removal. Everything else here is a forward hook.

Legend: B images, tiles or frames of a call, H heads, N tokens of one of them, P patches.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import nn

from foveate import ops
from foveate.attach.single import OfOneModel
from foveate.core import Grid, Modality
from foveate.models.adapter import Adapter
from foveate.models.tower import VisionTower

ENCODER_SIGNALS = ("encoder.cls_attention", "encoder.received_attention")


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
        encoder_runs: what encoder-stage methods did in this call.
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


class Shortened(Protocol):
    """An encoder stage in the middle of a call."""

    def sizes(self) -> torch.Tensor | None:
        """How many tokens each present one stands for, where attention weighs by it."""

    def unmerge_scores(self, score_BP: torch.Tensor) -> torch.Tensor:
        """Scores of the present patches as scores of all patches."""
        ...


class FeatureWatch(OfOneModel):
    """Records every call of the feature methods of one model.

    Args:
        model: the model.
        adapter: its adapter.
        signals: encoder signals that the recipe reads.
        shortened: the running encoder stage, if one may have shortened the sequence.
        active: whether anything is to be reduced at the moment; if not, nothing is recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        signals: set[str],
        shortened: Callable[[], Shortened | None],
        active: Callable[[], bool],
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.signals = signals
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
        wanted = [name for name in ENCODER_SIGNALS if name in self.signals]
        if wanted:
            for tower in {id(t): t for t in self.towers.values()}.values():
                names = [n for n in wanted if n != "encoder.cls_attention" or tower.has_cls]
                handles += TowerTap(
                    tower, tower.feature_block, self._on_attention(tower, names)
                ).handles

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
            self._local.current = record
            try:
                output = original(*args, **kwargs)
            finally:
                self._local.current = None
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            arguments.update(arguments.pop("kwargs", {}))
            self._finish(record, arguments, output)
            return output

        self._replaced[name] = self.base.__dict__.get(name)
        self.base.__dict__[name] = watched

    def _finish(self, record: FeatureRecord, arguments: Mapping[str, Any], output: Any) -> None:
        features = getattr(output, "pooler_output", None)
        if features is None:
            features = output[1] if isinstance(output, tuple) and len(output) > 1 else output
        record.grids = self.adapter.grids(self.model, record.modality, arguments, features)
        for name, parts in record.scores.items():
            record.signals[name] = self.adapter.token_scores(
                self.model, record.modality, torch.cat(parts), arguments, record.grids
            )
        record.scores = {}
        record.pixels = functools.partial(
            self.adapter.pixels, self.model, record.modality, arguments, record.grids
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
                record.num_prefix = tower.num_prefix

        return hook

    def _note_grid(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        record = self.current
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        if record is not None and grid is not None:
            record.grid_thw += [tuple(row) for row in grid.tolist()]
            record.shrinks_itself = "merge_sizes" in kwargs

    def _on_attention(
        self, tower: VisionTower, names: list[str]
    ) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
        def observe(captured: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> None:
            record = self.current
            if record is None:
                return
            with torch.no_grad():
                q, k = tower.assemble_qk(tower.feature_block, captured, kwargs)
                segments = tower.segments(tower.feature_block, kwargs)
                stage = self.shortened()
                size_BN = None if stage is None else stage.sizes()
                for name in names:
                    if segments is not None:
                        score = _packed_received(q, k, segments)
                    elif name == "encoder.cls_attention":
                        score = cls_attention(q, k, tower.num_prefix, size_BN)
                    else:
                        score = patch_received(q, k, tower.num_prefix, size_BN)
                    if stage is not None:
                        score = stage.unmerge_scores(score)
                    record.scores.setdefault(name, []).append(score)

        return observe


class TowerTap(OfOneModel):
    """Hooks that hand the query and key projections of one block to an observer.

    The observer is called right after the block's attention, before anything else in the block.
    """

    def __init__(
        self,
        tower: VisionTower,
        block: int,
        observe: Callable[[dict[str, torch.Tensor], dict[str, Any]], None],
    ) -> None:
        self._local = threading.local()
        self.observe = observe
        attention = tower.attentions[block]
        self.handles = [
            attention.register_forward_pre_hook(self._before, with_kwargs=True),
            attention.register_forward_hook(self._after),
        ]
        for name, module in tower.qk_taps(block).items():
            self.handles.append(module.register_forward_hook(functools.partial(self._tap, name)))

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._local.captured, self._local.kwargs = {}, kwargs

    def _tap(self, name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self._local.captured[name] = output

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        captured, kwargs = self._local.captured, self._local.kwargs
        self._local.captured, self._local.kwargs = {}, {}
        self.observe(captured, kwargs)


def cls_attention(
    q_BHND: torch.Tensor,
    k_BHND: torch.Tensor,
    num_prefix: int,
    size_BN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the [CLS] query to every patch, mean over heads: float32 [B, P]. O(B H N d).

    With sizes, attention is weighted by them as the block itself does, and the score is that of
    one of the patches that a token stands for.
    """
    bias = None if size_BN is None else size_BN.float().log()[:, None, None]
    rows_BH1N = ops.attention_rows(q_BHND[:, :, :1], k_BHND, attn_mask=bias)
    score_BP = rows_BH1N[:, :, 0, num_prefix:].mean(dim=1)
    return score_BP if size_BN is None else score_BP / size_BN[:, num_prefix:]


def patch_received(
    q_BHND: torch.Tensor,
    k_BHND: torch.Tensor,
    num_prefix: int,
    size_BN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention every patch receives from the patches, mean over heads: float32 [B, P].

    Prefix tokens take no part, neither as queries nor as keys. Sizes as in `cls_attention`; a
    merged query counts as often as it stands for patches. O(B H N^2 d) time, O(N) memory.
    """
    q_BHPD, k_BHPD = q_BHND[:, :, num_prefix:], k_BHND[:, :, num_prefix:]
    if size_BN is None:
        return ops.received_attention(q_BHPD, k_BHPD).float()
    size_BP = size_BN[:, num_prefix:].float()
    sum_BP = ops.attention_column_sums(
        q_BHPD, k_BHPD, row_weights=size_BP, attn_mask=size_BP.log()[:, None, None]
    )
    return sum_BP.float() / size_BP.sum(dim=1, keepdim=True) / size_BP


def _packed_received(
    q_1HND: torch.Tensor, k_1HND: torch.Tensor, boundaries: torch.Tensor
) -> torch.Tensor:
    """Received attention inside each segment of a packed row, float32 [N]."""
    starts = boundaries[:-1]
    lengths = (boundaries[1:] - starts).tolist()
    score_N = torch.zeros(q_1HND.shape[2], device=q_1HND.device)
    for length in sorted(set(lengths)):
        chosen = torch.tensor(
            [i for i, n in enumerate(lengths) if n == length], device=starts.device
        )
        columns = torch.arange(length, device=starts.device)
        index_Sn = (starts[chosen, None] + columns).to(q_1HND.device).long()
        q_SHnD, k_SHnD = (x[0][:, index_Sn].transpose(0, 1) for x in (q_1HND, k_1HND))
        score_N[index_Sn] = ops.received_attention(q_SHnD, k_SHnD).float()
    return score_N
