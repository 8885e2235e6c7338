"""Encoders whose blocks attend in windows (Swin): a method takes some of their blocks over.

A window must be whole, so nothing can leave the sequence of such a block. What can be done is to
run other tokens through several blocks and have the plane whole again behind them. The blocks keep
their weights; while attached, the `forward` of those concerned is one of the instance's own.

Legend: B images of a call, N tokens of one of them in the stage concerned.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from foveate.attach.encoder_pool import Replaced
from foveate.attach.gating import pixels_of
from foveate.attach.single import OfOneRun
from foveate.core import (
    Budget,
    Evidence,
    Grid,
    ItemReport,
    Method,
    Notebook,
    Recipe,
    Reduction,
    Report,
    StageReport,
)
from foveate.core.flops import FlopsBreakdown
from foveate.core.window_flops import merged_plane, window_block_flops, window_flops
from foveate.core.windows import WindowContext, WindowMethod, WindowStep
from foveate.errors import AttachmentError
from foveate.models.swin import SwinParts, SwinReading


@dataclass(eq=False)
class WindowRun:
    """One forward call of an encoder with windows.

    Attributes:
        num_images: B.
        plane: rows and columns of patches.
        stage_plane: of the stage concerned.
        steps: (group, N, tokens in between, FLOPs of an image) of every group that was taken over.
        reduction: what the last of them did.
        notes: what the method noted, values over the stage's tokens, [B, N].
        state: scratch of the method.
        seconds: host time in the groups.
    """

    num_images: int
    plane: tuple[int, int]
    stage_plane: tuple[int, int] = (1, 1)
    steps: list[tuple[int, int, int, int]] = field(default_factory=list)
    reduction: Reduction | None = None
    notes: list[Evidence] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class WindowStage(OfOneRun[WindowRun]):
    """One method on the longest stage of one encoder.

    Args:
        parts: the encoder.
        recipe: one step.
        budget: gives the budget of a step for the present call.
        evidence: whether what methods note is going to be drawn.
        seed: for methods that draw random numbers.

    Raises:
        AttachmentError: a method cannot act on windows, or the stage has too few blocks.
    """

    def __init__(
        self,
        parts: SwinParts,
        recipe: Recipe,
        budget: Callable[[int], Budget],
        *,
        evidence: bool = False,
        seed: int = 0,
    ) -> None:
        methods = [step.method for step in recipe]
        for method in methods:
            _refuse_sequential(method)
        if len(methods) != 1:
            raise AttachmentError("On Swin a recipe is one method: two would take the same blocks.")
        self.parts, self.budget, self.evidence, self.seed = parts, budget, evidence, seed
        self.method = methods[0]
        self.acting = cast("WindowMethod", self.method)
        self.method.check(None, None)
        depths = [len(blocks) for blocks in parts.stages]
        self.stage = depths.index(max(depths))
        self.blocks = parts.stages[self.stage]
        self.first = sum(depths[: self.stage])
        self.size = self.acting.window_group
        self.num_groups = len(self.blocks) // self.size
        if self.num_groups == 0:
            raise AttachmentError(
                f"{self.method.name} takes {self.size} blocks of a stage together, and the longest "
                f"stage of this encoder has {len(self.blocks)} (stages of {depths}; Swin-T has 6 "
                "there, Swin-S and larger 18)."
            )
        super().__init__()

    # -- hooks ----------------------------------------------------------------------------------

    def install(self, handles: list[Any]) -> None:
        """Register the hooks and put the blocks' `forward` in place, adding them to `handles`."""
        module = self.parts.module
        handles.append(module.register_forward_pre_hook(self._start, with_kwargs=True))
        handles.append(module.register_forward_hook(self._over, always_call=True))
        for group in range(self.num_groups):
            for place in range(1, self.size):
                block = self.blocks[group * self.size + place]
                handles.append(Replaced(block, "forward", self._forward(group, place, block)))

    def _start(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._local.run, self._local.taken = None, None
        if not self.budget(0).is_full:
            pixels = pixels_of(args, kwargs)
            patch = self.parts.patch_size
            rows, columns = (-(-s // p) for s, p in zip(pixels.shape[2:], patch, strict=True))
            self._local.run = WindowRun(pixels.shape[0], (rows, columns))

    def _over(self, module: Any, args: tuple, output: Any) -> None:
        run, self._local.run = self.run, None
        if run is not None and output is not None:
            run.state = {}
            self._finished(run)

    def _forward(self, group: int, place: int, block: Any) -> Callable[..., Any]:
        original = block.forward

        @functools.wraps(original)
        def forward(
            hidden_states: torch.Tensor,
            input_dimensions: tuple[int, int],
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            run = self.run
            if run is not None:
                if place == 1:
                    begin = time.perf_counter()
                    step = self._take(run, group, block, hidden_states, input_dimensions)
                    run.seconds += time.perf_counter() - begin
                    self._local.taken = None if step is None else group
                    if step is not None:
                        return step.x_BNC, None
                elif self._local.taken == group:
                    return hidden_states, None  # its part is done
            return original(hidden_states, input_dimensions, *args, **kwargs)

        return forward

    # -- taking blocks over -----------------------------------------------------------------------

    def _take(
        self, run: WindowRun, group: int, block: Any, x_BNC: torch.Tensor, plane: tuple[int, int]
    ) -> WindowStep | None:
        plane = int(plane[0]), int(plane[1])
        window = min(int(block.window_size), *plane)
        if plane[0] % window or plane[1] % window:
            patch, step = self.parts.patch_size, window << self.stage
            raise AttachmentError(
                f"{self.method.name} pools whole windows, and windows of {window} x {window} do "
                f"not fill the {plane[0]} x {plane[1]} tokens of stage {self.stage + 1}: resize "
                f"the images to multiples of {step * patch[0]} x {step * patch[1]} pixels."
            )
        run.stage_plane = plane
        begin, heads = group * self.size, self.parts.heads[self.stage]
        shape = (x_BNC.shape[0], x_BNC.shape[1])
        context = WindowContext(
            budget=self.budget(0),
            method=self.method.name,
            seed=self.seed,
            state=run.state,
            notebook=Notebook("encoder", shape, run.notes.append, self.first + begin)
            if self.evidence
            else None,
            stages=("encoder",),
            group=group,
            layer=self.first + begin,
            plane=plane,
            window=(window, window),
            blocks=[SwinReading(own, heads) for own in self.blocks[begin + 1 : begin + self.size]],
            num_heads=heads,
        )
        step = self.acting.encoder_windows(x_BNC, context)
        if step is not None:
            run.steps.append((group, shape[1], step.reduction.num_out, step.flops))
            run.reduction = step.reduction
        return step

    # -- report -----------------------------------------------------------------------------------

    def describe(self, report: Report, run: WindowRun) -> None:
        """Fill in tokens, FLOPs and evidence of a call."""
        dims, windows = self.parts.dims, self.parts.windows()
        full = reduced = window_flops(dims, run.plane, windows)
        plane = run.plane
        for _ in range(self.stage):
            plane = merged_plane(plane)
        own = window_block_flops(dims, self.stage, plane, windows[self.stage])
        for group, before, after, flops in run.steps:
            counts = ((count,) * run.num_images for count in (before, after))
            layer = self.first + group * self.size + 1
            report.stages.append(StageReport("encoder", self.method.name, *counts, layer=layer))
            reduced += flops - (self.size - 1) * own
        if run.steps:
            report.spend("encoder", run.seconds)
        costs = {"untouched": full, "reduced": reduced}
        report.flops = {
            name: FlopsBreakdown(encoder=cost * run.num_images).as_dict()
            for name, cost in costs.items()
        }
        if self.evidence and run.reduction is not None:
            report.items = [self._item(run, image) for image in range(run.num_images)]

    @staticmethod
    def _item(run: WindowRun, image: int) -> ItemReport:
        """An image's tokens in the stage concerned, with what was noted."""
        assert run.reduction is not None
        grid = Grid.image(*run.stage_plane)
        item = ItemReport(image, "image", grid, run.reduction.sample(image))
        for noted in run.notes:
            item.add_evidence(replace(noted, value=noted.value[image]))
        return item


def _refuse_sequential(method: Method) -> None:
    if not hasattr(method, "encoder_windows"):
        raise AttachmentError(
            f"{method.name} takes tokens out of the sequence of a block, and Swin's blocks attend "
            'in windows that must be whole. On Swin use "stvit", which runs some blocks on '
            "semantic tokens and has the plane whole again behind them; or use "
            f"{method.name} on an encoder whose blocks attend to the whole image (ViT, DeiT, "
            "DINOv2, CLIP, SigLIP)."
        )
