"""Hooks on a language model: visual tokens leave at its entry, in its layers, or from its cache.

What one forward call needs lives in thread-local state for that call; what later calls need lives
in the cache layers. Nothing is kept in hook closures but layer numbers.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from foveate.attach.blockwise import attention_hooks, begin_blockwise, plan_blockwise
from foveate.attach.cache import adopt, is_managed, move_positions, refuse_unsupported
from foveate.attach.decoder import DecoderCall, LayerModules
from foveate.attach.equal_distance import replace_forwards
from foveate.attach.evidence import item_spans, observe
from foveate.attach.features import FeatureRecord, FeatureWatch
from foveate.attach.frame_plans import Plans, deal_plans, note_plans
from foveate.attach.masks import MaskMaker
from foveate.attach.noting import Trails
from foveate.attach.plan import is_compact, plan_cache, plan_decoder
from foveate.attach.prompt import PromptReducer, find_items
from foveate.attach.quantised import exempt_samples, plan_storage
from foveate.attach.reading import rows_per_sample, vocabulary_of
from foveate.attach.rotary import ask_scale, note_frames, plan_rotary, rotary_of
from foveate.attach.rules import ask_rules, plan_rules
from foveate.attach.sequence import (
    Sequence,
    VisualItem,
    position_rows,
    split_deepstack,
    valid_columns,
    visual_rows,
)
from foveate.attach.single import OfOneModel
from foveate.core import Budget, LayerModule, Recipe, Report
from foveate.errors import AttachmentError
from foveate.models.adapter import Adapter
from foveate.models.companion import Companion


@dataclass(eq=False)
class LanguageSettings:
    """What the language stage reads from its attachment.

    Attributes:
        recipe: the recipe.
        budget: the budget of the next call, as the user gave it.
        step_budget: the budget of a step.
        active: whether the next call removes anything.
        new_report: an empty report of a call.
        publish: takes (report, feature records) of a finished call.
        evidence: whether what methods note is going to be drawn.
        companion: scores text against pictures for methods that ask; None: own embeddings.
        plans: the frames that were chosen of the images and videos of the next call.
    """

    recipe: Recipe
    budget: Callable[[], Budget]
    step_budget: Callable[[int], Budget]
    active: Callable[[], bool]
    new_report: Callable[[], Report]
    publish: Callable[[Report, list[FeatureRecord]], None]
    mask_only: bool = False
    seed: int = 0
    evidence: bool = False
    companion: Companion | None = None
    plans: Callable[[], Plans] = tuple


@dataclass(eq=False)
class _CallState(threading.local):
    """Per thread: the call in flight, and what its outer modules have seen so far."""

    call: DecoderCall | None = None
    placeholders: dict[str, torch.Tensor] | None = None
    text_ids: torch.Tensor | None = None
    records: dict[str, FeatureRecord] = field(default_factory=dict)
    repeats: int = 1


class LanguageStage(OfOneModel):
    """The projector, decoder and cache stages of a recipe on one model."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        watch: FeatureWatch,
        settings: LanguageSettings,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.watch = watch
        self.settings = settings
        self.text_model: Any = adapter.language_model(model)
        self.layers = adapter.layers(model)
        recipe = settings.recipe
        self.decoder_steps = plan_decoder(recipe, adapter, model, self._sample_budget)
        self.cache_steps = plan_cache(recipe, len(self.layers), self._sample_budget)
        self.rule_steps = plan_rules(recipe, adapter.text_config(model), self._sample_budget)
        self.rotary_step = plan_rotary(recipe, adapter, model, self._sample_budget)
        self.make_layer = plan_storage(recipe)
        self.attentions = adapter.text_attentions(model)
        self.blockwise = plan_blockwise(recipe, adapter, self.cache_steps)
        if self.blockwise is not None:
            self.cache_steps = []
        self.modules: tuple[LayerModules, ...] = ()
        if self.decoder_steps or self.cache_steps:
            norms, mlps = adapter.text_norms(model), adapter.text_mlps(model)
            self.modules = tuple(map(LayerModules, norms, self.attentions, mlps))
        self.attention_layers: frozenset[int] = frozenset()
        self.value_layers: frozenset[int] = frozenset()
        for step in (*self.decoder_steps, *self.cache_steps):
            read = frozenset(step.method.attention_layers(len(self.layers)))
            self.attention_layers |= read
            self.value_layers |= read if step.method.reads_values else frozenset()
        self.compact = is_compact(recipe, adapter)
        self.state = _CallState()

    def _sample_budget(self, index: int) -> Callable[[int], Budget]:
        return lambda sample: self.settings.step_budget(index).sample(sample, self.state.repeats)

    def install(self, handles: list[Any]) -> None:
        """Register all hooks, adding them to `handles`."""
        base, text = self.adapter.base(self.model), self.text_model
        register = handles.append
        if self.model is not base:
            register(self.model.register_forward_pre_hook(self._refuse_labels, with_kwargs=True))
        register(base.register_forward_pre_hook(self._enter_base, with_kwargs=True))
        register(base.register_forward_hook(self._leave_base, always_call=True))
        register(text.register_forward_pre_hook(self._enter_text, with_kwargs=True))
        for index, layer in enumerate(self.layers):
            register(layer.register_forward_pre_hook(self._enter_layer(index), with_kwargs=True))
            register(layer.register_forward_hook(self._leave_layer(index), prepend=True))
        if self.blockwise is not None:
            for index, attention in enumerate(self.adapter.text_attentions(self.model)):
                enter, leave = attention_hooks(index, lambda: self.state.call)
                register(attention.register_forward_pre_hook(enter, with_kwargs=True))
                register(attention.register_forward_hook(leave))
        for index in sorted(self.attention_layers):
            attention = self.attentions[index]
            for name in ("q", "k", "v") if index in self.value_layers else ("q", "k"):
                projection = attention.get_submodule(f"{name}_proj")
                register(projection.register_forward_hook(self._note(index, name)))
            register(attention.register_forward_hook(self._leave_attention(index)))
        if self.rule_steps:
            handles += replace_forwards(self.attentions, lambda: self.state.call)
        for index in sorted(set().union(*(step.observes for step in self.decoder_steps))):
            modules = self.modules[index]
            observed: dict[LayerModule, nn.Module] = {
                "attention": modules.attention,
                "mlp": modules.mlp,
            }
            for name, part in observed.items():
                hook = self._observe(index, name)
                register(part.register_forward_hook(hook, with_kwargs=True))

    # -- the outer model ------------------------------------------------------------------------

    def _refuse_labels(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None and self.settings.active():
            raise AttachmentError(
                "labels have the length of the full prompt, the logits of a reduced call do not. "
                "Compute the loss outside, or set retain=1 while training."
            )

    def _enter_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self.state
        state.call = state.placeholders = state.text_ids = None
        if not self.settings.active():
            return
        given = kwargs
        if args:
            call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            given = {**call.pop("kwargs", {}), **call}
        outputs = given.get("mm_encoder_outputs") or {}
        self.watch.begin(outputs)
        pixels = [name for name in given if name.startswith("pixel_values")]
        if not outputs and all(given[name] is None for name in pixels):
            return
        ids = given.get("input_ids")
        token_ids = self.adapter.placeholder_ids(self.model)
        if ids is not None:
            state.placeholders = {name: ids == token for name, token in token_ids.items()}
            state.text_ids = ids
            return
        embeds = given["inputs_embeds"]
        table = self.text_model.get_input_embeddings()
        state.placeholders = {
            name: (embeds == table(torch.tensor(token, device=embeds.device))).all(-1)
            for name, token in token_ids.items()
        }

    def _leave_base(self, module: nn.Module, args: tuple, output: Any) -> None:
        state = self.state
        call, records = state.call, list(state.records.values())
        state.call = state.placeholders = state.text_ids = None
        state.records = {}
        if call is not None and call.items and output is not None:
            self.settings.publish(call.report, records)

    # -- the text model -------------------------------------------------------------------------

    def _enter_text(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        has_visual = self.state.placeholders is not None
        cache = kwargs.get("past_key_values")
        if not is_managed(cache):
            if not has_visual:
                return None
            if cache is not None:
                refuse_unsupported(cache)
        kwargs = dict(kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs.pop("input_ids", None)
            embeds = module.get_input_embeddings()(args[0] if ids is None and args else ids)
            args = ()
        kwargs["input_ids"] = None
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise AttachmentError(
                "Reducing needs the 2-D attention mask [batch, tokens] (or none), this call "
                "passes one prepared for full-length layers."
            )
        entered = self._prefill if has_visual else self._continue
        return args, entered(module, embeds, kwargs)

    def _prefill(
        self, module: nn.Module, embeds: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """A call with new visual tokens."""
        config: Any = module.config
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        report = self.settings.new_report()
        batch, length = embeds.shape[:2]
        items, plans = self._find_items(batch, report), self.settings.plans()
        use_cache = kwargs.get("use_cache")
        if cache is not None or (config.use_cache if use_cache is None else use_cache):
            cache = adopt(cache, config, len(self.layers), mask, self.make_layer)
        valid = valid_columns(mask, length)
        positions = position_rows(kwargs.get("position_ids"), embeds, cache)
        deepstack = split_deepstack(
            kwargs.pop("visual_pos_masks", None), kwargs.pop("deepstack_visual_embeds", None)
        )
        reducer = PromptReducer(
            [
                (i, self.settings.recipe.steps[i].method)
                for i in self.settings.recipe.at("projector")
            ],
            lambda step, sample: self._sample_budget(step)(sample),
            self.compact,
            self.settings.seed,
            report,
            self.state.text_ids,
            [
                (step.number, step.method)
                for step in self.decoder_steps
                if "projector" not in step.method.stages()
            ],
            evidence=self.settings.evidence,
            stages={i: step.stages for i, step in enumerate(self.settings.recipe)},
            companion=self.settings.companion,
            plans=deal_plans(items, plans, self.state.repeats),
            vocabulary=vocabulary_of(self.model),
        )
        embeds, sequence, positions, moved = reducer(embeds, valid, positions, items, deepstack)
        if moved is not None and cache is not None:
            move_positions(cache, moved)
        report.prompt_lengths = [ids.shape[0] for ids in sequence.ids]
        call = self._open_call(config, embeds, sequence, length, cache)
        call.items, call.report, call.deepstack = items, report, deepstack
        call.decoder_steps, call.cache_steps = self.decoder_steps, self.cache_steps
        call.attention_layers = self.attention_layers
        call.spans = item_spans(sequence) if self.decoder_steps else []
        call.columns, call.num_columns = reducer.columns, reducer.num_columns
        call.repeats = self.state.repeats
        call.trails = Trails.of(call) if self.settings.evidence else None
        if self.rule_steps:
            positions = ask_rules(call, self.rule_steps, positions)
        exempt_samples(cache, sequence)
        ask_scale(call, self.rotary_step, positions, config)
        note_frames(report, self.settings.recipe)
        note_plans(report, self.settings.recipe, plans)
        if self.blockwise is not None:
            call.blockwise = begin_blockwise(call, self.blockwise, embeds, config)
        return self._model_inputs(kwargs, call, embeds, positions)

    def _find_items(self, batch: int, report: Report) -> list[list[VisualItem]]:
        state = self.state
        assert state.placeholders is not None
        state.records = self.watch.take()
        items = find_items(state.placeholders, state.records, report)
        described = sum(len(record.grids) for record in state.records.values())
        shown = sum(len(sample) for sample in items)
        # Beam search repeats every sample and its items.
        repeats = max(1, shown // max(described, 1))
        named = self.settings.budget().num_samples
        state.repeats = rows_per_sample(named, repeats, batch, state.text_ids)
        report.layer_lengths = [[] for _ in range(batch)]
        report.cache_lengths = [[] for _ in range(batch)]
        return items

    def _continue(
        self, module: nn.Module, embeds: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """A later step on a cache that was shortened."""
        cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
        batch, length = embeds.shape[:2]
        # A single new token is never padding, and asking would wait for the device at every step.
        valid = valid_columns(mask, length) if length > 1 else None
        positions = position_rows(kwargs.get("position_ids"), embeds, cache)
        sequence = Sequence(length, valid, [visual_rows([], [], embeds.device)] * batch)
        call = self._open_call(module.config, embeds, sequence, length, cache)
        return self._model_inputs(kwargs, call, embeds, positions)

    def _open_call(
        self, config: Any, embeds: torch.Tensor, sequence: Sequence, num_tokens: int, cache: Any
    ) -> DecoderCall:
        self.state.call = DecoderCall(
            sequence=sequence,
            items=[],
            num_tokens=num_tokens,
            masks=MaskMaker(config, embeds.shape[0], embeds.dtype, embeds.device),
            cache=cache,
            report=Report(),
            seed=self.settings.seed,
            num_layers=len(self.layers),
            modules=self.modules,
            mask_only=self.settings.mask_only,
            rotary=rotary_of(self.text_model, self.adapter, cache),
        )
        return self.state.call

    def _model_inputs(
        self,
        kwargs: dict[str, Any],
        call: DecoderCall,
        embeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> dict[str, Any]:
        call.position_PBL = positions
        kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = positions if positions.shape[0] > 1 else positions[0]
        kwargs["past_key_values"] = call.cache
        # Every layer gets its own mask; the model only needs one that it passes on unread.
        kwargs["attention_mask"] = call.mask_of_layer(0, embeds.shape[1])
        return kwargs

    # -- the layers -----------------------------------------------------------------------------

    def _enter_layer(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            call = self.state.call
            if call is None:
                return None
            if getattr(module, "gradient_checkpointing", False) and module.training:
                raise AttachmentError(
                    "Gradient checkpointing runs layers again after the call is over, when their "
                    "reductions are gone: switch it off."
                )
            hidden, kwargs = call.enter_layer(
                index, args[0] if args else kwargs["hidden_states"], kwargs
            )
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _leave_layer(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            call = self.state.call
            if call is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            changed = call.leave_layer(index, hidden)
            if changed is hidden:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _note(self, index: int, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if self.state.call is not None:
                self.state.call.note_projection(index, name, output)

        return hook

    def _leave_attention(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self.state.call is not None:
                self.state.call.leave_attention(index, module)

        return hook

    def _observe(self, index: int, name: LayerModule) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            call = self.state.call
            if call is None or not call.items:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            observe(call, index, name, hidden, output[0] if isinstance(output, tuple) else output)

        return hook
