"""Methods between the blocks of a backbone that is no vision transformer.

A backbone hands its stream through a seam in front of every block and behind the last. Hooks on
the seams take tokens away, tell scans where those left have been, and bring back what a method
recovers.

Legend: B samples of a call, N tokens of one of them, K tokens that are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from foveate.attach.single import OfOneRun
from foveate.core import (
    BackboneContext,
    BackboneMethod,
    Budget,
    Evidence,
    ItemReport,
    Method,
    Notebook,
    Recipe,
    Reduction,
    Report,
    StageReport,
    Tokens,
)
from foveate.core.flops import FlopsBreakdown
from foveate.errors import AttachmentError
from foveate.models.adapter import Adapter
from foveate.models.backbone_adapters import BackboneAdapter, Passage
from foveate.models.backbones.stream import Stream
from foveate.models.encoders import EncoderAdapter


def check_kinds(recipe: Recipe, adapter: Adapter | EncoderAdapter) -> None:
    """Raise `AttachmentError` when a method and the model are not of one kind."""
    kind = adapter.kind if isinstance(adapter, BackboneAdapter) else None
    for step in recipe:
        method = step.method
        own = method.kind if isinstance(method, BackboneMethod) else None
        if own == kind:
            continue
        if own is None:
            reason = "acts on vision transformers and language models"
        else:
            where = {"pose": "MixSTE", "ssm": "VisionMamba", "s4": "ViS4mer"}[own]
            reason = f"runs on {where} of foveate.models.backbones alone"
        raise AttachmentError(f"{method.name} {reason}; this model is a {adapter.docs_name}.")


@dataclass(eq=False)
class BackboneRun:
    """One forward call of a backbone.

    Attributes:
        num_samples: B.
        num_tokens: N.
        reduction: from the N tokens to the present ones; None: untouched.
        lengths: tokens in front of every block.
        final: tokens behind the last seam.
        cuts: (block, method, tokens before, tokens after) of every reduction.
        owners: who has reduced, to be asked for a recovery.
        states: scratch of each method, by step number.
        left: at full length, what every token was when it left; empty unless it is brought back.
        notes: what methods noted.
        seconds: host time spent in methods.
        read: signals that methods have asked for.
    """

    num_samples: int
    num_tokens: int
    reduction: Reduction | None = None
    lengths: list[int] = field(default_factory=list)
    final: int = 0
    cuts: list[tuple[int, str, int, int]] = field(default_factory=list)
    owners: list[tuple[int, BackboneMethod]] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    left: tuple[torch.Tensor, ...] = ()
    notes: list[Evidence] = field(default_factory=list)
    seconds: float = 0.0
    read: set[str] = field(default_factory=set)


class BackboneStage(OfOneRun[BackboneRun]):
    """Encoder-stage methods on one backbone.

    Args:
        model: the backbone.
        adapter: of its family.
        recipe: methods of this kind of backbone alone.
        budget: gives the budget of a step for the present call.
        restore: bring every token back behind the last block: those that left, as they left.
        evidence: whether what methods note is going to be drawn.
        seed: for methods that draw random numbers.

    Raises:
        AttachmentError: the model shortens its sequence itself and all of it is to be restored.
        ValueError: a method asks for cuts that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: BackboneAdapter,
        recipe: Recipe,
        budget: Callable[[int], Budget],
        *,
        restore: bool,
        evidence: bool = False,
        seed: int = 0,
    ) -> None:
        if restore and adapter.shrinks:
            raise AttachmentError(
                f"{adapter.docs_name} pools its sequence from block to block, so there is no full "
                "length to restore: leave restore out."
            )
        self.model, self.adapter, self.budget = model, adapter, budget
        self.restore, self.evidence, self.seed = restore, evidence, seed
        self.seams = adapter.seams(model)
        methods = [step.method for step in recipe]
        self.steps = [(i, m) for i, m in enumerate(methods) if isinstance(m, BackboneMethod)]
        self.cuts = {number: tuple(m.cuts(self.num_blocks)) for number, m in self.steps}
        super().__init__()

    @property
    def num_blocks(self) -> int:
        """Blocks of the backbone."""
        return len(self.seams) - 1

    # -- hooks ----------------------------------------------------------------------------------

    def install(self, handles: list[Any]) -> None:
        """Register all hooks, adding them to `handles`."""
        for index, seam in enumerate(self.seams):
            last = index == self.num_blocks
            hook = self._at_end if last else partial(self._at_seam, index)
            handles.append(seam.register_forward_hook(hook))
        read = {cut for n, m in self.steps if m.reads_scans for cut in self.cuts[n]}
        for cut in sorted(read):
            tap = self.adapter.tap(self.model, cut - 1)
            if tap is not None:
                handles.append(tap.register_forward_hook(self._on_scan))
        handles.append(self.model.register_forward_hook(self._over, always_call=True))

    def _at_seam(self, index: int, module: nn.Module, args: tuple, stream: Stream) -> Stream | None:
        if index == 0:
            active = any(not self.budget(number).is_full for number, _ in self.steps)
            samples, tokens = stream.states[0].shape[:2]
            self._local.run = BackboneRun(samples, tokens) if active else None
        run = self.run
        if run is None:
            return None
        for number, method in self.steps:
            if index in self.cuts[number] and not self.budget(number).is_full:
                stream = self._reduce(run, number, method, index, stream)
        self._local.scans = None
        run.lengths.append(stream.num_tokens)
        return stream

    def _at_end(self, module: nn.Module, args: tuple, stream: Stream) -> Stream | None:
        run = self.run
        if run is None:
            return None
        if run.reduction is not None:
            stream = self._recovered(run, run.reduction, stream)
        run.final = stream.num_tokens
        return stream

    def _on_scan(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if self.run is not None:
            self._local.scans = output

    def _over(self, module: nn.Module, args: tuple, output: Any) -> None:
        run, self._local.run = self.run, None
        self._local.scans = None
        if run is not None and run.final and output is not None:
            # The run outlives the call in the report; its features must not.
            run.left, run.states, run.owners = (), {}, []
            self._finished(run)

    # -- reducing -------------------------------------------------------------------------------

    def _reduce(
        self, run: BackboneRun, number: int, method: BackboneMethod, index: int, stream: Stream
    ) -> Stream:
        begin = time.perf_counter()
        source_BK = self._source(run, stream)
        context = self._context(run, number, method, index, stream, source_BK)
        x_BKC = self.adapter.tokens(stream)
        with torch.no_grad():
            reduction = method.encoder(Tokens(x_BKC.detach()), context)
        if reduction is not None and not reduction.is_identity:
            if self.restore:
                run.left = self._filled(run, source_BK, stream.states)
            before, after = x_BKC.shape[1], reduction.num_out
            run.cuts.append((index, method.name, before, after))
            run.reduction = reduction if run.reduction is None else run.reduction.then(reduction)
            run.owners.append((number, method))
            stream = self._shortened(run, method, stream, reduction)
            states = method.settle(stream.states[0], context), *stream.states[1:]
            stream = stream.behind(*states)
        run.seconds += time.perf_counter() - begin
        return stream

    def _shortened(
        self, run: BackboneRun, method: BackboneMethod, stream: Stream, reduction: Reduction
    ) -> Stream:
        if method.in_place:
            return replace(stream, mask_BK=reduction.groups_BN >= 0)
        assert run.reduction is not None
        return Stream(
            tuple(reduction.apply(x) for x in stream.states),
            stream.length,
            self.adapter.places(self.model, run.reduction.anchor_BM),
            gaps=method.keeps_gaps,
        )

    def _recovered(self, run: BackboneRun, reduction: Reduction, stream: Stream) -> Stream:
        begin = time.perf_counter()
        x, *others = stream.states
        for number, method in reversed(run.owners):
            source_BK = self._source(run, stream)
            context = self._context(run, number, method, self.num_blocks, stream, source_BK)
            full = method.recover(x, reduction, context)
            if full is not None:
                stream = Stream((full, *others), stream.length)
                break
        else:
            if self.restore:
                states = self._filled(run, reduction.anchor_BM, stream.states)
                stream = Stream(states, stream.length)
        run.seconds += time.perf_counter() - begin
        return stream

    @staticmethod
    def _source(run: BackboneRun, stream: Stream) -> torch.Tensor:
        """Which of the N tokens the present ones are."""
        if run.reduction is not None and run.reduction.num_out == stream.num_tokens:
            return run.reduction.anchor_BM
        x = stream.states[0]
        return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])

    @staticmethod
    def _filled(
        run: BackboneRun, source_BK: torch.Tensor, states: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """The latest state of all N tokens."""
        if not run.left:
            return states
        row_B1 = torch.arange(run.num_samples, device=source_BK.device)[:, None]
        filled = []
        for full, x in zip(run.left, states, strict=True):
            full = full.to(x.dtype).clone()
            full[row_B1, source_BK] = x
            filled.append(full)
        return tuple(filled)

    def _context(
        self,
        run: BackboneRun,
        number: int,
        method: Method,
        index: int,
        stream: Stream,
        source_BK: torch.Tensor,
    ) -> BackboneContext:
        signals = dict(self.adapter.signals(self.model, stream, source_BK))
        signals["scan_outputs"] = lambda: getattr(self._local, "scans", None)
        return BackboneContext(
            budget=self.budget(number),
            method=method.name,
            seed=self.seed,
            state=run.states.setdefault(number, {}),
            notebook=self._notebook(run, index, stream),
            layer=index,
            num_layers=self.num_blocks,
            point="block_start",
            kind=self.adapter.kind,
            num_source=run.num_tokens,
            left_BK=source_BK,
            read={name: partial(self._told, run, name, read) for name, read in signals.items()},
        )

    @staticmethod
    def _told(run: BackboneRun, name: str, read: Callable[[], Any]) -> Any:
        run.read.add(name)
        return read()

    def _notebook(self, run: BackboneRun, index: int, stream: Stream) -> Notebook | None:
        if not self.evidence or index == self.num_blocks:
            return None
        shape = (run.num_samples, stream.num_tokens)
        group_BN = None if run.reduction is None else run.reduction.groups_BN.cpu()

        def take(noted: Evidence) -> None:
            run.notes.append(noted if group_BN is None else noted.take(group_BN))

        return Notebook("encoder", shape, take, index)

    # -- report ---------------------------------------------------------------------------------

    def describe(self, report: Report, run: BackboneRun) -> None:
        """Fill in tokens, FLOPs and evidence of a call."""
        for block, name, before, after in run.cuts:
            pairs = ((count,) * run.num_samples for count in (before, after))
            report.stages.append(StageReport("encoder", name, *pairs, layer=block))
        if run.cuts:
            report.spend("encoder", run.seconds)
        report.block_lengths = list(run.lengths)
        full = self._untouched(run)
        costs = {"untouched": full, "reduced": full}
        if run.cuts:
            passage = Passage(run.num_tokens, run.lengths, run.final, run.read)
            costs["reduced"] = self.adapter.flops(self.model, passage)
        report.flops = {
            name: FlopsBreakdown(encoder=cost * run.num_samples).as_dict()
            for name, cost in costs.items()
        }
        if self.evidence:
            report.items = list(self._items(run))

    def _untouched(self, run: BackboneRun) -> int:
        num = run.num_tokens
        lengths = [
            num >> block if self.adapter.shrinks else num for block in range(self.num_blocks)
        ]
        return self.adapter.flops(self.model, Passage(num, lengths, num))

    def _items(self, run: BackboneRun) -> Any:
        """One entry per sample, with what was noted."""
        place_P = self.adapter.item_places(self.model, run.num_tokens)
        grid = self.adapter.item_grid(self.model, run.num_tokens)
        modality = "image" if self.adapter.kind == "ssm" else "video"
        for sample in range(run.num_samples):
            item = ItemReport(sample, modality, grid)
            if run.reduction is not None:
                kept_N = run.reduction.groups_BN[sample].cpu() >= 0
                index_K = kept_N[place_P].nonzero()[:, 0]
                item.reduction = Reduction.select(index_K, place_P.shape[0])
            for noted in run.notes:
                item.add_evidence(replace(noted, value=noted.value[sample][place_P]))
            yield item
