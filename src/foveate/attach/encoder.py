"""The patches and encoder stages: shorter sequences before, between and inside vision blocks.

A block computes x = x + attention(...), then x = x + mlp(norm(x)). To shorten the sequence between
the two with hooks alone, the norm gets the shorter x, the MLP branch hands zeros to the residual
addition, and the block's output is replaced by (shorter x) + (its MLP output).

What the patches stage keeps out is gone before the first block. Its images differ in length, so
they share rows (`Packing`) in which no image sees another; methods inside the encoder get them one
by one, padded, all the same.

Legend: B images of a call, N tokens of one of them, M tokens left, D channels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from foveate.attach.encoder_attention import Rewriting, outside_reader, rewriting, size_hook
from foveate.attach.encoder_joining import join_frames, joins, note_front
from foveate.attach.encoder_lora import lora_handles
from foveate.attach.encoder_pool import around, refusing
from foveate.attach.encoder_run import (
    EncoderRun,
    NoBranch,
    acts_at,
    loses_some,
    recovered,
    restoring,
    states_left,
    take_notes,
)
from foveate.attach.gating import (
    GateSettings,
    bring_back,
    pack,
    pass_gates,
    pixels_of,
    plane_of,
)
from foveate.attach.noting import encoder_notebook
from foveate.attach.single import OfOneModel
from foveate.attach.tower_tap import TowerTap
from foveate.core import (
    Budget,
    EncoderContext,
    EncoderPoint,
    Grid,
    Method,
    Notebook,
    Reduction,
    Stage,
    Tokens,
)
from foveate.errors import AttachmentError
from foveate.models.tower import VisionTower


class EncoderStage(OfOneModel):
    """Patches- and encoder-stage methods on one tower.

    Args:
        tower: where to hook.
        steps: (step number, method) in order.
        budget: gives the budget of a step for the present call.
        restore: bring the sequence back to full length after the feature block, so that a
            projector that expects the full grid works; a bare encoder may leave it short.
        finished: called with the run when the encoder is done.
        evidence: whether what methods note is going to be drawn.
        layouts: gives `EncoderContext.layouts` of the running call.
        stages: by step number, the stages at which the step acts.
        gates: the same of steps that act at the patches stage.
        seed: for methods that draw random numbers.
    """

    def __init__(
        self,
        tower: VisionTower,
        steps: list[tuple[int, Method]],
        budget: Callable[[int], Budget],
        restore: bool,
        finished: Callable[[EncoderRun], None],
        evidence: bool = False,
        layouts: Callable[[], Sequence[tuple[Grid, int]]] = tuple,
        stages: Mapping[int, tuple[Stage, ...]] = MappingProxyType({}),
        gates: Sequence[tuple[int, Method]] = (),
        seed: int = 0,
    ) -> None:
        if tower.packed and gates:
            raise AttachmentError(
                f"{gates[0][1].name} keeps patches out of the encoder, but this encoder packs all "
                "images into one row with windows and rotary positions; the patches stage needs "
                'one sequence per image. Use another method here, e.g. "vidcom2".'
            )
        if tower.packed:
            names = ", ".join(method.name for _, method in steps)
            raise AttachmentError(
                f"{names} acts inside the encoder, but this encoder packs all images into one row "
                "with windows and rotary positions; encoder-stage methods need one sequence per "
                'image. Use the projector or decoder stage here, e.g. "divprune".'
            )
        config = getattr(tower.module, "config", None)
        implementation = str(getattr(config, "_attn_implementation", ""))
        self.flash = implementation if "flash" in implementation else ""
        if self.flash and any(map(_is_proportional, steps)):
            raise AttachmentError(
                f"{implementation} cannot weigh merged tokens by their size: pass prop_attn=False, "
                'or load the encoder with attn_implementation="sdpa".'
            )
        self.tower = tower
        self.steps = steps
        self.budget = budget
        self.restore = restore
        self.finished = finished
        self.evidence = evidence
        self.layouts = layouts
        self.stages = stages
        self.gates = gates
        self.seed = seed
        self.reads_values = any(method.reads_values for _, method in steps)
        self._local = threading.local()

    @property
    def run(self) -> EncoderRun | None:
        """The running call in this thread."""
        return getattr(self._local, "run", None)

    def present(self) -> Reduction | None:
        """From all tokens of an image to the present ones, prefix included; None: all of them."""
        run = self.run
        return None if run is None or run.restored else run.reduction

    def images_in_a_row(self) -> int:
        """Frames of a video that were joined into one row."""
        return 1 if self.run is None or self.run.restored else self.run.joined

    # -- hooks ----------------------------------------------------------------------------------

    def install(self, handles: list[Any]) -> None:
        """Register all hooks, adding them to `handles`."""
        tower = self.tower
        handles += around(tower, self._start, self._finish, lambda: self.run)
        handles += [refusing(tower.module, name, self._is_active) for name in tower.refuses]
        for index, block in enumerate(tower.blocks):
            handles.append(
                block.register_forward_pre_hook(self._before_block(index), with_kwargs=True)
            )
            observe = self._on_attention(index)
            tap = TowerTap(tower, index, observe, self.reads_values)
            handles += tap.handles
            own = self._rewriting(index, tap) if rewriting(self.steps) else None
            asking = None if own is None else own.asking
            # First of all, so that whoever records this attention sees the weights it works with.
            handles.append(
                tower.attentions[index].register_forward_pre_hook(
                    size_hook(tower.attentions[index], self._bias, self.flash, asking),
                    with_kwargs=True,
                    prepend=True,
                )
            )
            for number, method in self.steps:
                handles += lora_handles(tower, index, method, self._is_acting(number))
            if own is not None:
                output = tower.attention_outputs[index]
                handles.append(output.register_forward_pre_hook(own.before_output))
            handles.append(
                tower.mlp_inputs[index].register_forward_pre_hook(self._before_mlp(index))
            )
            handles.append(tower.mlp_outputs[index].register_forward_hook(self._after_mlp))
            # Ahead of the hooks with which transformers records hidden states.
            handles.append(block.register_forward_hook(self._after_block(index), prepend=True))

    def _is_active(self) -> bool:
        return any(not self.budget(index).is_full for index, _ in (*self.gates, *self.steps))

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        prefix, active = self.tower.num_prefix, self._is_active()
        self._local.run = run = EncoderRun(num_prefix=prefix) if active else None
        if run is not None:
            run.plane = plane_of(args, kwargs, self.tower.patch_size)
            if self.gates:
                run.pixels = pixels_of(args, kwargs)

    def _finish(self, module: nn.Module, args: tuple, output: Any) -> None:
        run, self._local.run = self.run, None
        if run is not None and run.lengths and output is not None:
            # The run outlives the call in the report; its features must not.
            run.tokens = run.captured = run.left_BNC = run.packing = run.pixels = None
            run.state = {}
            self.finished(run)

    def _before_block(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            run = self.run
            if run is None:
                return None
            x_BND = args[0] if args else kwargs["hidden_states"]
            if not run.lengths:
                run.num_images, run.num_tokens = x_BND.shape[:2]
            gated = run.pixels is not None
            if gated:
                x_BND = self._gate(run, x_BND)
            x_BND, changed = self._reduce_at("block_start", index, x_BND)
            run.attention_lengths.append(x_BND.shape[1])
            run.rows.append(x_BND.shape[0])
            if not changed and not gated:
                return None
            if args:
                return (x_BND, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x_BND}

        return hook

    def _on_attention(self, index: int) -> Callable:
        def observe(captured: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> None:
            if self.run is not None:
                q, k = self.tower.assemble_qk(index, captured, kwargs)
                v = self.tower.assemble_v(index, captured) if self.reads_values else None
                self.run.captured = q, k, v

        return observe

    def _is_acting(self, number: int) -> Callable[[], bool]:
        return lambda: self.run is not None and not self.budget(number).is_full

    def _rewriting(self, index: int, tap: TowerTap) -> Rewriting:
        def contexts(run: EncoderRun) -> list[tuple[Method, EncoderContext]]:
            if index > self.tower.feature_block:
                return []
            self._on_attention(index)(*tap.so_far())
            captured = run.captured or (None, None, None)
            if run.packing is not None:
                captured = tuple(x if x is None else run.packing.unpack_heads(x) for x in captured)
            shape = (run.num_images, run.num_tokens)
            return [
                (method, self._context(run, number, method, index, captured, shape))
                for number, method in rewriting(self.steps)
                if not self.budget(number).is_full
            ]

        return Rewriting(self.tower, lambda: self.run, contexts)

    def _before_mlp(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple) -> Any:
            run = self.run
            if run is None:
                return None
            x_BND, changed = self._reduce_at("after_attention", index, args[0])
            run.lengths.append(x_BND.shape[1])
            run.mlp_rows.append(x_BND.shape[0])
            if not changed:
                return None
            run.stash = [x_BND]
            return (x_BND, *args[1:])

        return hook

    def _after_mlp(self, module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        run = self.run
        if run is None or not run.stash:
            return None
        run.stash.append(output)
        # The block adds this to a stream that is still long; its sum is thrown away.
        return output.new_zeros(1, 1, 1).as_subclass(NoBranch)

    def _after_block(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            run = self.run
            if run is None:
                return None
            y_BND = output[0] if isinstance(output, tuple) else output
            changed = bool(run.stash)
            if changed:
                x_BMD, mlp_BMD = run.stash
                gain = self.tower.mlp_gain(index)
                # With a gain in one pass over the stream.
                y_BND = x_BMD + mlp_BMD if gain is None else torch.addcmul(x_BMD, mlp_BMD, gain)
                run.stash = []
            y_BND, shorter = self._reduce_at("block_end", index, y_BND)
            changed |= shorter
            if index == self.tower.feature_block and run.packing is not None:
                y_BND, changed = run.packing.unpack(y_BND), True
                run.packing = None
            if self.restore and index == self.tower.feature_block and run.reduction is not None:
                y_BND, changed = self._full_length(run, index, y_BND), True
                run.restored = True
            if not changed:
                return None
            return (y_BND, *output[1:]) if isinstance(output, tuple) else y_BND

        return hook

    # -- reducing -------------------------------------------------------------------------------

    def _reduce_at(
        self, point: EncoderPoint, index: int, x_BND: torch.Tensor
    ) -> tuple[torch.Tensor, bool]:
        run = self.run
        assert run is not None
        acting = [
            (number, method)
            for number, method in self.steps
            if acts_at(method, point) and not self.budget(number).is_full
        ]
        changed = False
        if run.restored or index > self.tower.feature_block or not acting:
            return x_BND, changed
        captured, packing = run.captured or (None, None, None), run.packing
        if point == "block_start":
            captured = (None, None, None)  # of the block before
        if packing is not None:
            x_BND = packing.unpack(x_BND)
            captured = tuple(None if x is None else packing.unpack_heads(x) for x in captured)
        for number, method in acting:
            begin = time.perf_counter()
            shape = (x_BND.shape[0], x_BND.shape[1])
            context = self._context(run, number, method, index, captured, shape, point)
            tokens = Tokens(x_BND) if run.tokens is None else replace(run.tokens, x_BND=x_BND)
            if point == "block_start" and joins(method):
                rows = join_frames(run, method, context, tokens)
                if rows is not tokens:
                    tokens, x_BND, changed = rows, rows.x_BND, True
                    shape = (x_BND.shape[0], x_BND.shape[1])
                    context = self._context(run, number, method, index, captured, shape, point)
            with torch.no_grad():
                reduction = method.encoder(tokens, context)
            take_notes(run, number, method, context)
            if reduction is not None and not reduction.is_identity:
                if method.encoder_drops and self.restore and loses_some(run, reduction):
                    run.left_BNC = states_left(run, tokens)
                run.tokens = tokens.reduce(reduction)
                x_BND, changed = run.tokens.x_BND, True
                run.reduction = run.tokens.reduction
                note_front(run)
            run.seconds += time.perf_counter() - begin
        if changed:
            run.captured = None
            pack(run)
        if run.packing is not None:
            x_BND = run.packing.pack(x_BND)
        return x_BND, changed or packing is not None

    def _context(
        self,
        run: EncoderRun,
        number: int,
        method: Method,
        index: int,
        captured: tuple[torch.Tensor | None, ...],
        shape: tuple[int, int],
        point: EncoderPoint = "after_attention",
    ) -> EncoderContext:
        queries, keys, values = captured
        return EncoderContext(
            budget=self.budget(number),
            method=method.name,
            seed=self.seed,
            state=run.state.setdefault(number, {}),
            layer=index,
            num_layers=self.tower.feature_block + 1,
            point=point,
            num_prefix=run.front,
            has_cls=self.tower.has_cls,
            num_images=run.num_images,
            joined=run.joined,
            keys_BHNd=keys,
            queries_BHNd=queries,
            values_BHNd=values,
            size_BN=self.sizes(),
            plane=run.plane,
            read_keys_values=outside_reader(run, self.tower, index),
            notebook=self._notebook(run, index, shape),
            stages=self.stages.get(number, ()),
            layouts=self.layouts,
        )

    def _full_length(self, run: EncoderRun, index: int, y_BMD: torch.Tensor) -> torch.Tensor:
        shape = (run.num_images, run.num_tokens)
        captured = run.captured or (None, None, None)
        for number, method in restoring(self.steps):
            if not self.budget(number).is_full:
                context = self._context(run, number, method, index, captured, shape, "block_end")
                if (found_BND := recovered(run, method, context, y_BMD)) is not None:
                    return found_BND
        return bring_back(run, y_BMD)

    def _gate(self, run: EncoderRun, x_BND: torch.Tensor) -> torch.Tensor:
        settings = GateSettings(
            self.budget, self.tower, self.seed, self.evidence, self.stages, self.layouts
        )
        # A method inside the encoder, or whoever reads the short output, expects every image.
        return pass_gates(run, x_BND, self.gates, settings, self.restore and not self.steps)

    def _notebook(self, run: EncoderRun, index: int, shape: tuple[int, int]) -> Notebook | None:
        if not self.evidence:
            return None
        images = (run.joined, run.num_tokens, run.num_prefix)
        return encoder_notebook(run.notes, run.reduction, shape, index, *images)

    def _bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What sizes and padding add to the attention logits of the running block."""
        size_BN, run = self.sizes(), self.run
        if size_BN is None or run is None:
            return None
        if run.packing is None:
            return size_BN.log()[:, None, None].to(dtype)
        return run.packing.attention_bias(size_BN, dtype)

    def sizes(self) -> torch.Tensor | None:
        """How many tokens each present one counts for in attention, [B, N]; None: one each.

        Padding of images that have fewer tokens left than others counts for none.
        """
        run = self.run
        if run is None or run.restored or run.tokens is None:
            return None
        tokens = run.tokens
        if tokens.size_BN is not None and any(map(_is_proportional, self.steps)):
            return tokens.size_BN
        return None if tokens.mask_BN is None else tokens.mask_BN.float()


def _is_proportional(step: tuple[int, Method]) -> bool:
    return bool(getattr(step[1], "proportional_attention", False))
