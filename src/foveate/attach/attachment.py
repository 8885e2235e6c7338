"""`foveate.reduce`: put a recipe on an unmodified transformers model, and take it off without a trace."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence as Samples
from types import TracebackType
from typing import Any

import torch
from torch import nn

from foveate.attach.cache import adopt, is_managed, refuse_unsupported
from foveate.attach.decoder import DecoderCall, StepPlan
from foveate.attach.encoder import EncoderRun, EncoderStage
from foveate.attach.features import ENCODER_SIGNALS, FeatureWatch
from foveate.attach.masks import MaskMaker
from foveate.attach.prompt import PromptReducer, find_items
from foveate.attach.reporting import CostModel, describe_budget, note_encoder
from foveate.attach.sequence import Sequence
from foveate.core import Budget, Method, Recipe, Report
from foveate.errors import AttachmentError, MissingSignalError
from foveate.models.adapter import Adapter
from foveate.models.encoders import EncoderAdapter
from foveate.models.registry import adapter_for

#: Modules that carry hooks of a live attachment: attaching twice would reduce twice.
_HOOKED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def reduce(
    model: nn.Module,
    recipe: Recipe | Method | str | Iterable[Method],
    *,
    retain: float | Samples[float] | None = None,
    tokens: int | Samples[int] | None = None,
    positions: str | None = None,
    mask_only: bool = False,
    restore: bool | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Attachment:
    """Attach a recipe to a model; use it as a context manager, or keep the handle and `remove()` it.

    Args:
        model: a transformers vision-language model of a known family, or a vision encoder alone.
        recipe: a recipe, a method, a list of methods, a text such as "holitom" or
            "tome(retain=0.6)@encoder + holitom", or the path of a recipe's JSON file.
        retain: fraction of visual tokens kept, in (0, 1]; one value, or one per sample.
        tokens: absolute number of tokens kept per image or video instead; one value or one per
            sample. Neither: the method's published default.
        positions: "compact" renumbers a shortened prompt, "original" keeps position ids with gaps;
            default: what the method was published with ("original" on models with M-RoPE).
        mask_only: keep full lengths in the language model and only mask what a decoder or cache
            stage drops; slow, exact reference for tests.
        restore: bring an encoder's output back to full length by un-merging; always on inside a
            language model, off by default on an encoder alone.
        seed: for methods that draw random numbers.
        arguments: hyper-parameters, given to the methods that have them.

    Raises:
        AttachmentError: the model is attached already, or the recipe cannot act on it.
        UnknownModelError: no adapter knows the model.
        ValueError: recipe, budget or arguments are malformed. The model stays as it was.

    Example:
        >>> with foveate.reduce(model, "holitom", retain=0.15) as run:      # doctest: +SKIP
        ...     out = model.generate(**inputs)
        >>> print(run.report)                                               # doctest: +SKIP
    """
    made = Recipe.of(recipe, **arguments)
    if positions is not None:
        made = Recipe(made.steps, positions)  # pyright: ignore[reportArgumentType]
    budget = Budget(retain, tokens)  # pyright: ignore[reportArgumentType]
    return Attachment(model, made, budget, mask_only=mask_only, restore=restore, seed=seed)


class Attachment:
    """A recipe on a model. Made by `reduce`; `remove()` or leaving the `with` block undoes it.

    Attributes:
        model: the model.
        recipe: the recipe.
        report: the account of the last call that carried visual tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        budget: Budget,
        *,
        mask_only: bool = False,
        restore: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.mask_only = mask_only
        self.seed = seed
        self.report = Report()
        self._adapter = adapter_for(model)
        self._budgets: tuple[Budget, ...] = ()
        self._budget = budget
        self.budget = budget
        self._handles: list[Any] = []
        self._hooked: list[nn.Module] = []
        self._watch: FeatureWatch | None = None
        self._local = threading.local()
        with _LOCK:
            self._refuse_double()
            try:
                self._attach(restore)
            except BaseException:
                self.remove()
                raise

    # -- budget ---------------------------------------------------------------------------------

    @property
    def budget(self) -> Budget:
        """The budget of the next call; assign `Budget(...)` or a fraction to change it."""
        return self._budget

    @budget.setter
    def budget(self, value: Budget | float) -> None:
        budget = value if isinstance(value, Budget) else Budget(retain=value)
        self._budgets = self.recipe.budgets(budget)
        self._budget = budget

    @property
    def active(self) -> bool:
        """Whether the next call removes anything: False when every budget is 1."""
        return any(not budget.is_full for budget in self._budgets)

    # -- life cycle -----------------------------------------------------------------------------

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook and instance attribute off again; calling it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._watch is not None:
            self._watch.uninstall()
            self._watch = None
        for module in self._hooked:
            _HOOKED.pop(module, None)
        self._hooked = []
        self._local = threading.local()

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "removed"
        name = type(self.model).__name__
        return f"<foveate {self.recipe} on {name}, {describe_budget(self.budget)}, {state}>"

    def _refuse_double(self) -> None:
        for module in self.model.modules():
            if module in _HOOKED:
                raise AttachmentError(
                    f"{type(self.model).__name__} carries {_HOOKED[module]} already; remove() that "
                    'first, or compose both into one recipe: "tome@encoder + holitom".'
                )

    def _attach(self, restore: bool | None) -> None:
        if isinstance(self._adapter, EncoderAdapter):
            self._attach_encoder_alone(self._adapter, bool(restore))
        else:
            self._attach_language_model(self._adapter)
        for module in self.model.modules():
            _HOOKED[module] = str(self.recipe)
            self._hooked.append(module)

    # -- encoder alone --------------------------------------------------------------------------

    def _attach_encoder_alone(self, adapter: EncoderAdapter, restore: bool) -> None:
        outside = [step for step in self.recipe if "encoder" not in step.stages]
        if outside:
            raise AttachmentError(
                f"{outside[0].method.name} acts at {', '.join(outside[0].stages)}, but "
                f"{type(self.model).__name__} is an encoder alone. Use an encoder-stage method "
                'such as "tome", or attach to a vision-language model.'
            )
        tower = adapter.tower(self.model)
        for step in self.recipe:
            step.method.check(len(tower.blocks), None)
        self._check_scalar_budget()

        def finished(run: EncoderRun) -> None:
            self.report = Report(
                type(self.model).__name__, str(self.recipe), describe_budget(self.budget)
            )
            note_encoder(self.report, self.recipe, [run])
            costs.encoder_alone(self.report, run)
            self._encoder_run = run

        costs = CostModel(self.model, has_text=False)

        stage = self._encoder_stage(tower, restore, finished)
        self._handles += stage.install()

    def _encoder_stage(
        self, tower: Any, restore: bool, finished: Callable[[EncoderRun], None]
    ) -> EncoderStage:
        steps = [(i, self.recipe.steps[i].method) for i in self.recipe.at("encoder")]
        return EncoderStage(tower, steps, lambda i: self._budgets[i], restore, finished)

    def _check_scalar_budget(self) -> None:
        if self.recipe.at("encoder") and self.budget.num_samples is not None:
            raise AttachmentError(
                "An encoder runs all images of a call as one batch, so its budget must be one "
                "value; give per-sample budgets to projector or decoder methods only."
            )

    @property
    def encoder_reduction(self) -> Any:
        """The composed `Reduction` of the last encoder call (prefix tokens included), or None.

        `run.encoder_reduction.restore(last_hidden_state)` brings dense features back.
        """
        run = getattr(self, "_encoder_run", None)
        return None if run is None else run.reduction

    # -- language model -------------------------------------------------------------------------

    def _attach_language_model(self, adapter: Adapter) -> None:
        layers = adapter.layers(self.model)
        attentions = adapter.text_attentions(self.model)
        towers = adapter.towers(self.model)
        self._check_scalar_budget()
        self._check_text_model(adapter)
        plans = self._plan_layers(len(layers))
        depth = next(iter(towers.values())).feature_block + 1
        for step in self.recipe:
            step.method.check(depth, len(layers))
        signals = self._signals(adapter, towers)
        self._costs = CostModel(self.model, has_text=True)
        stages: list[EncoderStage] = []
        if self.recipe.at("encoder"):
            for tower in {id(t): t for t in towers.values()}.values():
                stages.append(self._encoder_stage(tower, True, self._note_encoder_run))

        def restore_scores(score_BP: torch.Tensor) -> torch.Tensor:
            for stage in stages:
                if stage.run is not None:
                    return stage.unmerge_scores(score_BP)
            return score_BP

        self._watch = FeatureWatch(
            self.model, adapter, signals, restore_scores, lambda: self.active
        )
        self._handles += self._watch.install()
        for stage in stages:
            self._handles += stage.install()
        self._hook_language_model(adapter, layers, attentions, plans)

    def _check_text_model(self, adapter: Adapter) -> None:
        config = adapter.text_config(self.model)
        sliding = [t for t in getattr(config, "layer_types", None) or () if t != "full_attention"]
        if sliding:
            raise AttachmentError(
                f"This language model has {sliding[0]} layers, whose windows count cache slots "
                "instead of positions; reducing its prompt would move the windows. Only full "
                "attention is supported."
            )

    def _signals(self, adapter: Adapter, towers: dict[str, Any]) -> set[str]:
        available = {"encoder.received_attention", "text.embeddings", "text.tokens"}
        if all(tower.has_cls for tower in towers.values()):
            available.add("encoder.cls_attention")
        chosen: set[str] = set()
        for index in self.recipe.at("projector"):
            method = self.recipe.steps[index].method
            for need in method.needs:
                options = (need,) if isinstance(need, str) else need
                found = [name for name in options if name in available]
                if not found:
                    raise MissingSignalError(
                        method.name, tuple(options), f"{adapter.docs_name} has no [CLS] token"
                    )
                chosen.add(found[0])
        return chosen

    def _plan_layers(self, num_layers: int) -> dict[str, list[StepPlan]]:
        plans: dict[str, list[StepPlan]] = {"decoder": [], "cache": []}
        for index in self.recipe.at("decoder"):
            method = self.recipe.steps[index].method
            layers = frozenset(method.decoder_layers(num_layers))
            wrong = [layer for layer in layers if not 0 <= layer < num_layers]
            if wrong:
                raise AttachmentError(
                    f"{method.name} wants to act before layer {wrong[0]} of {num_layers}."
                )
            plans["decoder"].append(StepPlan(index, method, layers, self._sample_budget(index)))
        for index in self.recipe.at("cache"):
            method = self.recipe.steps[index].method
            plans["cache"].append(
                StepPlan(index, method, frozenset(range(num_layers)), self._sample_budget(index))
            )
        return plans

    def _sample_budget(self, index: int) -> Callable[[int], Budget]:
        return lambda sample: self._budgets[index].sample(sample, self._repeats)

    @property
    def _repeats(self) -> int:
        return getattr(self._local, "repeats", 1)

    def _note_encoder_run(self, run: EncoderRun) -> None:
        self._local.encoder_runs = [*getattr(self._local, "encoder_runs", []), run]
        self._encoder_run = run

    # -- hooks on the language model ------------------------------------------------------------

    def _hook_language_model(
        self,
        adapter: Adapter,
        layers: tuple[nn.Module, ...],
        attentions: tuple[nn.Module, ...],
        plans: dict[str, list[StepPlan]],
    ) -> None:
        self._plans = plans
        declared: set[int] = set()
        for plan in plans["decoder"]:
            declared |= set(plan.method.attention_layers(len(layers)))
        self._attention_layers = frozenset(declared)
        base, text = adapter.base(self.model), adapter.language_model(self.model)
        register = self._handles.append
        if self.model is not base:
            register(self.model.register_forward_pre_hook(self._refuse_labels, with_kwargs=True))
        register(base.register_forward_pre_hook(self._enter_base, with_kwargs=True))
        register(base.register_forward_hook(self._leave_base, always_call=True))
        register(text.register_forward_pre_hook(self._enter_text, with_kwargs=True))
        for index, layer in enumerate(layers):
            register(layer.register_forward_pre_hook(self._enter_layer(index), with_kwargs=True))
            register(layer.register_forward_hook(self._leave_layer(index), prepend=True))
        for index in sorted(declared):
            attention = attentions[index]
            for name in ("q", "k"):
                projection = attention.get_submodule(f"{name}_proj")
                register(projection.register_forward_hook(self._note(index, name)))
            register(attention.register_forward_hook(self._leave_attention(index)))

    @property
    def _call(self) -> DecoderCall | None:
        return getattr(self._local, "call", None)

    def _refuse_labels(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None and self.active:
            raise AttachmentError(
                "labels have the length of the full prompt, the logits of a reduced call do not. "
                "Compute the loss outside, or set retain=1 while training."
            )

    def _enter_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._local.call = None
        self._local.placeholders = None
        self._local.text_ids = None
        if not self.active:
            return
        has_features = bool(kwargs.get("mm_encoder_outputs")) or any(
            value is not None for name, value in kwargs.items() if name.startswith("pixel_values")
        )
        if not has_features:
            return
        adapter = self._adapter
        assert isinstance(adapter, Adapter)
        ids = kwargs.get("input_ids", args[0] if args else None)
        token_ids = adapter.placeholder_ids(self.model)
        if ids is not None:
            self._local.placeholders = {m: ids == token for m, token in token_ids.items()}
            self._local.text_ids = ids
            return
        embeds = kwargs["inputs_embeds"]
        table = adapter.language_model(self.model).get_input_embeddings()
        device = embeds.device
        self._local.placeholders = {
            m: (embeds == table(torch.tensor(token, device=device))).all(-1)
            for m, token in token_ids.items()
        }

    def _leave_base(self, module: nn.Module, args: tuple, output: Any) -> None:
        call, self._local.call = self._call, None
        self._local.placeholders = None
        if call is not None and call.items and output is not None:
            runs = getattr(self._local, "encoder_runs", [])
            self._local.encoder_runs = []
            note_encoder(call.report, self.recipe, runs)
            self._costs.language_model(call.report, self._local.records.values(), runs)
            self.report = call.report

    def _enter_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        placeholders = self._local.placeholders
        cache = kwargs.get("past_key_values")
        has_visual = placeholders is not None
        if not has_visual and not is_managed(cache):
            return None
        kwargs = dict(kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs.pop("input_ids", None)
            ids = args[0] if ids is None and args else ids
            args, embeds = (), module.get_input_embeddings()(ids)
        kwargs["input_ids"] = None
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise AttachmentError(
                "Reducing needs the 2-D attention mask [batch, tokens] (or none), this call "
                "passes one prepared for full-length layers. Drop it, or compile outside."
            )
        entered = self._prefill if has_visual else self._continue
        return args, entered(module, embeds, kwargs)

    def _prefill(
        self, module: nn.Module, embeds: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        assert self._watch is not None
        adapter = self._adapter
        assert isinstance(adapter, Adapter)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        config: Any = module.config
        use_cache = kwargs.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        if cache is not None:
            refuse = None if is_managed(cache) else refuse_unsupported
            if refuse is not None:
                refuse(cache)
        report = Report(type(self.model).__name__, str(self.recipe), describe_budget(self.budget))
        records = self._local.records = self._watch.take()
        items = find_items(self._local.placeholders, records, report)
        batch, length = embeds.shape[:2]
        described = sum(len(record.grids) for record in records.values())
        shown = sum(len(sample) for sample in items)
        self._local.repeats = max(1, shown // max(described, 1))
        self._check_samples(batch)
        report.layer_lengths = [[] for _ in range(batch)]
        report.cache_lengths = [[] for _ in range(batch)]
        if cache is not None or use_cache:
            cache = adopt(cache, config, len(adapter.layers(self.model)), mask)
        valid = None if mask is None else mask[:, -length:].bool()
        if valid is not None and bool(valid.all()):
            valid = None
        seen = 0 if cache is None else cache.get_seq_length()
        positions = _positions(kwargs.get("position_ids"), batch, length, seen, embeds.device)
        shift = None if cache is None or not cache.layers else cache.layers[0].shift_B
        positions = _shifted(positions, shift)
        compact = self._is_compact(adapter)
        deepstack = _split_deepstack(
            kwargs.pop("visual_pos_masks", None), kwargs.pop("deepstack_visual_embeds", None)
        )
        steps = [(i, self.recipe.steps[i].method) for i in self.recipe.at("projector")]
        reducer = PromptReducer(
            steps,
            lambda step, sample: self._budgets[step].sample(sample, self._repeats),
            compact,
            self.seed,
            report,
            self._local.text_ids,
        )
        embeds, sequence, positions, moved = reducer(embeds, valid, positions, items, deepstack)
        report.prompt_lengths = [ids.shape[0] for ids in sequence.ids]
        if moved is not None and cache is not None:
            for layer in cache.layers:
                layer.shift_B = moved if layer.shift_B is None else layer.shift_B + moved
        self._open_call(module, embeds, sequence, items, length, cache, report, deepstack)
        kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = positions if positions.shape[0] > 1 else positions[0]
        kwargs["past_key_values"] = cache
        return self._with_mask(kwargs, sequence, cache, embeds)

    def _continue(
        self, module: nn.Module, embeds: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """A later step on a cache that this library shortened."""
        cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
        batch, length = embeds.shape[:2]
        valid = None
        if mask is not None and length > 1:
            valid = mask[:, -length:].bool()
            valid = None if bool(valid.all()) else valid
        first = cache.layers[0]
        positions = _positions(kwargs.get("position_ids"), batch, length, first.seen, embeds.device)
        positions = _shifted(positions, first.shift_B)
        no_visual = [_no_visual(embeds.device) for _ in range(batch)]
        sequence = Sequence(length, valid, no_visual)
        self._open_call(module, embeds, sequence, [], length, cache, Report(), [])
        kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = positions if positions.shape[0] > 1 else positions[0]
        return self._with_mask(kwargs, sequence, cache, embeds)

    def _open_call(
        self,
        module: nn.Module,
        embeds: torch.Tensor,
        sequence: Sequence,
        items: list,
        num_tokens: int,
        cache: Any,
        report: Report,
        deepstack: list[list[torch.Tensor]],
    ) -> None:
        config: Any = module.config
        self._local.call = DecoderCall(
            sequence=sequence,
            items=items,
            num_tokens=num_tokens,
            masks=MaskMaker(config, embeds.shape[0], embeds.dtype, embeds.device),
            cache=cache,
            report=report,
            seed=self.seed,
            num_layers=config.num_hidden_layers,
            decoder_steps=self._plans["decoder"] if items else [],
            cache_steps=self._plans["cache"] if items else [],
            attention_layers=self._attention_layers if items else frozenset(),
            deepstack=deepstack,
            mask_only=self.mask_only,
        )

    def _with_mask(
        self, kwargs: dict[str, Any], sequence: Sequence, cache: Any, embeds: torch.Tensor
    ) -> dict[str, Any]:
        # Every layer gets its own mask; the model only needs one that it passes on unread.
        call = self._call
        assert call is not None
        first = None if cache is None else cache.layers[0]
        kwargs["attention_mask"] = call.masks.make(
            0 if first is None else first.length,
            None if first is None else first.valid_BT,
            embeds.shape[1],
            sequence.valid_BL,
        )
        return kwargs

    def _is_compact(self, adapter: Adapter) -> bool:
        if adapter.mrope:
            if self.recipe.positions == "compact":
                raise AttachmentError(
                    f"{adapter.docs_name} numbers visual tokens by time, row and column (M-RoPE); "
                    'they cannot be renumbered. Use positions="original".'
                )
            return False
        if self.recipe.positions != "auto":
            return self.recipe.positions == "compact"
        projector = self.recipe.at("projector")
        if not projector:
            return False
        return self.recipe.steps[projector[0]].method.card.positions == "compact"

    def _check_samples(self, batch: int) -> None:
        named = self.budget.num_samples
        if named is not None and named * self._repeats != batch:
            raise AttachmentError(
                f"The budget names {named} samples, the batch has {batch // self._repeats}."
            )

    def _enter_layer(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden, kwargs = call.enter_layer(index, hidden, kwargs)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _leave_layer(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            call = self._call
            if call is None or not call.items:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            changed = call.leave_layer(index, hidden)
            if changed is hidden:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _note(self, index: int, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if self._call is not None:
                self._call.note_projection(index, name, output)

        return hook

    def _leave_attention(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self._call is not None:
                self._call.leave_attention(index, module)

        return hook


def _positions(
    position_ids: torch.Tensor | None, batch: int, length: int, seen: int, device: torch.device
) -> torch.Tensor:
    """Position ids as int64 [P, B, L], P = 1 for text positions, 3 or 4 with M-RoPE."""
    if position_ids is None:
        position_ids = torch.arange(seen, seen + length, device=device)[None]
    if position_ids.dim() == 2:
        position_ids = position_ids[None]
    return position_ids.expand(-1, batch, -1)


def _shifted(positions: torch.Tensor, shift_B: torch.Tensor | None) -> torch.Tensor:
    if shift_B is None:
        return positions
    return (positions - shift_B[None, :, None]).clamp(min=0)


def _split_deepstack(
    mask_BL: torch.Tensor | None, levels: list[torch.Tensor] | None
) -> list[list[torch.Tensor]]:
    """Deepstack features per level and sample, [N, D] each, in the order of the rows."""
    if mask_BL is None or not levels:
        return []
    counts = mask_BL.sum(dim=1).tolist()
    return [list(level.split(counts)) for level in levels]


def _no_visual(device: torch.device) -> Any:
    from foveate.attach.decoder import visual_rows

    return visual_rows([], [], [], [], device)
