"""Block-wise prefill: attention over a long prompt in runs, and the question on a rebuilt cache.

Every layer works on all tokens of the prompt; only its attention module is called several times.
Blocks of visual tokens see the blocks right before them and all text, so that no call holds more
than its own rows of the attention matrix. What follows the last visual token is the last call: it
attends to the cache that the method has rebuilt, which is also what later calls find.

Legend: B batch, L padded length, K samples of equal layout, C context tokens of a sample (all up to
its last visual token), S tokens behind them, P past entries, G key heads, d head channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Samples
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.attach.block_layout import BlockLayout, Group, rows_of
from foveate.attach.cache import ReducedLayer, join_valid
from foveate.attach.cache_rebuild import CacheRebuilder, Geometry, context_fields
from foveate.attach.masks import MaskMaker
from foveate.attach.plan import StepPlan
from foveate.attach.sequence import gather_columns
from foveate.core import Method, Recipe, StageReport
from foveate.core.blocks import Blocks, PrefillContext
from foveate.errors import AttachmentError
from foveate.models.adapter import Adapter
from foveate.ops.blocks import BlockRun

if TYPE_CHECKING:
    from foveate.attach.decoder import DecoderCall


@dataclass(frozen=True, eq=False)
class BlockwisePlan:
    """The method of a recipe that reads prompts in blocks.

    Attributes:
        step: the method.
        compact: the rebuilt cache and what follows are numbered contiguously.
        mrope: positions have time, row and column.
    """

    step: StepPlan
    compact: bool
    mrope: bool


def plan_blockwise(
    recipe: Recipe, adapter: Adapter, cache_steps: Samples[StepPlan]
) -> BlockwisePlan | None:
    """The block-wise method of a recipe, None when there is none."""
    found = [step for step in cache_steps if type(step.method).prefill is not Method.prefill]
    if not found:
        return None
    method = found[0].method
    policy = method.card.positions if recipe.positions == "auto" else recipe.positions
    return BlockwisePlan(found[0], policy == "compact" and not adapter.mrope, adapter.mrope)


class _Memory:
    """What attention modules take for a cache while a group's context is read.

    Nothing is written in place, so that gradients may pass.
    """

    def __init__(self, past: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.past = past
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.run = BlockRun(0, 0, (), (), 0)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new run, give it with what it sees."""
        shown = [*(self.parts[part] for part in self.run.seen), (keys, values)]
        lengths = list(self.run.parts)
        self.parts += zip(keys.split(lengths, dim=2), values.split(lengths, dim=2), strict=True)
        if self.past is not None:
            shown = [self.past, *shown]
        return _joined(shown)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All runs, in order."""
        return _joined(self.parts)


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([k for k, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2)


@dataclass(eq=False)
class _Tail:
    """What the attention module takes for a cache when it reads the text behind the context."""

    keys: torch.Tensor
    values: torch.Tensor
    layer: ReducedLayer | None
    valid_BT: torch.Tensor | None
    num_tokens: int

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the rebuilt context and the text into the real cache, if there is one."""
        keys = torch.cat([self.keys, keys], dim=2)
        values = torch.cat([self.values, values], dim=2)
        if self.layer is None:
            return keys, values
        self.layer.expect(self.valid_BT, self.num_tokens)
        return self.layer.update(keys, values)


class BlockwisePrefill:
    """One call's prompt, read in blocks; `begin_blockwise` makes it, `attention_hooks` use it.

    Attributes:
        placeholder: passed to the model and its layers as a mask that nobody reads: the dense one
            would hold L x L entries.
    """

    def __init__(
        self, call: DecoderCall, plan: BlockwisePlan, blocks: list[Blocks | None], config: Any
    ) -> None:
        self.call, self.plan, self.config = call, plan, config
        self.layout = BlockLayout(call.sequence, blocks)
        self.rebuilder = CacheRebuilder(call, plan.step, self.layout, plan.compact, plan.mrope)
        device = self.layout.device
        self.placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.masks = [
            MaskMaker(config, len(group.samples), call.masks.dtype, device)
            for group in self.layout.groups
        ]
        self.joined: dict[tuple[int, int], torch.Tensor | None] = {}
        self.alive: list[Any] = []
        self.output_BLD: torch.Tensor | None = None

    def enter(self, layer: int, module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Read the context in runs; return the arguments of the module's last call."""
        call, layout, hidden_BLD = self.call, self.layout, kwargs["hidden_states"]
        past = call.layer_cache(layer)
        self.output_BLD = torch.zeros_like(hidden_BLD)
        context: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(layout.rows)
        for number, group in enumerate(layout.groups):
            keys, values = self._read(number, group, module, kwargs, past)
            for place, sample in enumerate(group.samples):
                context[sample] = keys[place : place + 1], values[place : place + 1]
        begin = time.perf_counter()
        rotation = kwargs["position_embeddings"]
        geometry, keys, values = self.rebuilder.rebuild(layer, context, hidden_BLD, rotation)
        self._note(layer, geometry)
        num_past = 0 if past is None else past.length
        valid = self._past_valid(past, num_past, geometry)
        mask = call.masks.make(
            num_past + keys.shape[2], valid, layout.num_tail, layout.tail_valid_BS
        )
        tail_rotation = geometry.tail_rotation
        if tail_rotation is None:
            tail_rotation = tuple(gather_columns(x, layout.tail_BS, x.dim() - 2) for x in rotation)
        call.report.spend("cache", time.perf_counter() - begin)
        return {
            **kwargs,
            "hidden_states": gather_columns(hidden_BLD, layout.tail_BS, 1),
            "position_embeddings": tail_rotation,
            "attention_mask": mask,
            "past_key_values": _Tail(keys, values, past, geometry.valid_BT, call.num_tokens),
        }

    def leave(self, output: Any) -> Any:
        """The output of all columns, from the runs and the module's last call."""
        assert self.output_BLD is not None
        out_BSD = output[0] if isinstance(output, tuple) else output
        for sample, tail_S in enumerate(self.layout.tails):
            if len(tail_S):
                self.output_BLD[sample, tail_S] = out_BSD[sample, -len(tail_S) :]
        full, self.output_BLD = self.output_BLD, None
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _read(
        self,
        number: int,
        group: Group,
        module: Any,
        kwargs: dict[str, Any],
        past: ReducedLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a group's context through the module; its keys and values [K, G, C, d]."""
        where = (group.sample_K1, group.rows_KC)
        hidden_KCD = kwargs["hidden_states"][where]
        rotation = [rows_of(part, *where) for part in kwargs["position_embeddings"]]
        sample_K = group.sample_K1[:, 0]
        before = valid_KP = None
        if past is not None and past.length:
            before = (past.kv[0][sample_K], past.kv[1][sample_K])
            valid_KP = None if past.valid_BT is None else past.valid_BT[sample_K]
        runs = group.runs
        if self.call.mask_only:
            length = group.rows_KC.shape[1]
            runs = [BlockRun(0, length, (length,), (), 0)]
        memory, outputs = _Memory(before), []
        for run in runs:
            memory.run = run
            part = slice(run.start, run.stop)
            given = {
                **kwargs,
                "hidden_states": hidden_KCD[:, part],
                "position_embeddings": tuple(x[..., part, :] for x in rotation),
                "attention_mask": self._run_mask(number, group, run, before, valid_KP),
                "past_key_values": memory,
            }
            # Straight to `forward`: the hooks on this module are those that called us.
            out = module.forward(**given)
            outputs.append(out[0] if isinstance(out, tuple) else out)
        assert self.output_BLD is not None
        self.output_BLD[where] = torch.cat(outputs, dim=1)
        return memory.whole()

    def _run_mask(
        self,
        number: int,
        group: Group,
        run: BlockRun,
        before: tuple[torch.Tensor, torch.Tensor] | None,
        valid_KP: torch.Tensor | None,
    ) -> torch.Tensor | None:
        num_past = 0 if before is None else before[0].shape[2]
        batch, device = len(group.samples), self.layout.device
        if self.call.mask_only:
            allowed = group.dense_mask()[None, None].expand(batch, 1, -1, -1)
            first = allowed.new_ones(batch, 1, run.length, num_past)
            first = first if valid_KP is None else first & valid_KP[:, None, None]
            hidden = ~torch.cat([first, allowed], dim=-1)
            dtype = self.call.masks.dtype
            low = torch.finfo(dtype).min
            return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, low)
        seen = num_past + run.num_past
        if valid_KP is None:
            return self.masks[number].make(seen, None, run.length, None)
        # Not shared: masks are shared by address, and this validity is made here.
        valid_KT = join_valid(valid_KP, num_past, None, run.num_past, batch, device)
        maker = MaskMaker(self.config, batch, self.call.masks.dtype, device)
        return maker.make(seen, valid_KT, run.length, None)

    def _past_valid(
        self, past: ReducedLayer | None, num_past: int, geometry: Geometry
    ) -> torch.Tensor | None:
        """Validity of past and rebuilt entries; one tensor per pair, so that masks are shared."""
        past_BP = None if past is None else past.valid_BT
        key = (id(past_BP), id(geometry))
        if key not in self.joined:
            slots, batch = max(geometry.slots), len(geometry.slots)
            self.joined[key] = join_valid(
                past_BP, num_past, geometry.valid_BM, slots, batch, self.layout.device
            )
            self.alive.append(past_BP)
        return self.joined[key]

    def _note(self, layer: int, geometry: Geometry) -> None:
        """What the report says of this layer."""
        report, layout = self.call.report, self.layout
        pairs = [0] * len(layout.rows)
        for group in layout.groups:
            for sample in group.samples:
                pairs[sample] = sum(run.pairs for run in group.runs)
        if not report.attention_pairs:
            report.attention_pairs = [[] for _ in pairs]
        for sample, tail_S in enumerate(layout.tails):
            pairs[sample] += len(tail_S) * (geometry.sizes[sample] + len(tail_S))
            report.attention_pairs[sample].append(pairs[sample])
        before = tuple(len(visual_N) for visual_N in layout.visual)
        after = tuple(
            n if made is None else made.length - len(made.text_T)
            for n, made in zip(before, geometry.rebuilt, strict=True)
        )
        if before != after:
            name = self.plan.step.method.name
            report.stages.append(StageReport("cache", name, before, after, layer))


def begin_blockwise(
    call: DecoderCall, plan: BlockwisePlan, embeds_BLD: torch.Tensor, config: Any
) -> BlockwisePrefill | None:
    """Ask the method for the blocks of every sample; None when it leaves all of them alone.

    Raises:
        AttachmentError: full-length masks are asked for under a kernel that takes none.
    """
    blocks = [_blocks(call, plan.step, sample, embeds_BLD) for sample in range(len(embeds_BLD))]
    if all(said is None for said in blocks):
        return None
    if call.mask_only and config._attn_implementation not in ("sdpa", "eager"):
        raise AttachmentError(
            f"mask_only needs a dense mask, which {config._attn_implementation} does not take; "
            'load the model with attn_implementation="sdpa".'
        )
    return BlockwisePrefill(call, plan, blocks, config)


def _blocks(
    call: DecoderCall, step: StepPlan, sample: int, embeds_BLD: torch.Tensor
) -> Blocks | None:
    visual = call.sequence.visual[sample]
    if visual.num == 0 or step.budget(sample).is_full:
        return None
    rows_S = call.sequence.rows(sample, embeds_BLD.device)
    is_text_S = torch.ones_like(rows_S, dtype=torch.bool)
    is_text_S[torch.searchsorted(rows_S, visual.rows_N)] = False
    text_S = rows_S[is_text_S]
    behind_S = text_S[text_S > visual.rows_N[-1]]
    context = PrefillContext(
        **context_fields(call, step, sample),
        x_ND=embeds_BLD[sample, visual.rows_N],
        text_TD=embeds_BLD[sample, behind_S if len(behind_S) else text_S],
    )
    with torch.no_grad():
        said = step.method.prefill(context)
    if said is not None and said.block_N.shape != visual.rows_N.shape:
        raise ValueError(
            f"{step.method.name} numbered the blocks of {tuple(said.block_N.shape)} tokens; the "
            f"sample has [{visual.num}]."
        )
    return said


def attention_hooks(layer: int, current: Callable[[], DecoderCall | None]) -> tuple[Any, Any]:
    """A pre-hook and a hook for the attention module of a layer.

    `current` gives the call in flight.
    """

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = current()
        if call is None or call.blockwise is None:
            return None
        if args:
            kwargs, args = {**kwargs, "hidden_states": args[0]}, ()
        return args, call.blockwise.enter(layer, module, kwargs)

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        call = current()
        if call is None or call.blockwise is None:
            return None
        return call.blockwise.leave(output)

    return enter, leave
