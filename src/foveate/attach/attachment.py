"""`foveate.reduce`: put a recipe on an unmodified transformers model, and take it off again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Samples
from types import TracebackType
from typing import Any

from torch import nn

from foveate.attach.backbone import BackboneRun, BackboneStage, check_kinds
from foveate.attach.encoder import EncoderRun, EncoderStage
from foveate.attach.features import FeatureRecord, FeatureWatch
from foveate.attach.frame_plans import Plans
from foveate.attach.language import LanguageSettings, LanguageStage
from foveate.attach.masks import refuse_unmasked
from foveate.attach.reporting import CostModel, describe_budget, note_encoder
from foveate.attach.single import OfOneModel
from foveate.attach.tower_tap import BlockReads, block_reads
from foveate.attach.windowed import WindowRun, WindowStage
from foveate.core import SIGNALS, Budget, DensePrediction, Method, Recipe, Reduction, Report
from foveate.errors import AttachmentError, MissingSignalError
from foveate.models.adapter import Adapter
from foveate.models.backbone_adapters import BackboneAdapter
from foveate.models.companion import Companion
from foveate.models.encoders import EncoderAdapter
from foveate.models.registry import adapter_for
from foveate.models.swin import SwinAdapter
from foveate.models.tower import VisionTower

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
    evidence: bool = False,
    companion: Companion | None = None,
    **arguments: Any,
) -> Attachment:
    """Attach a recipe to a model: a context manager, or a handle with `remove()`.

    Args:
        model: a transformers vision-language model of a known family, a vision encoder alone (of
            timm, too), or a backbone of `foveate.models.backbones`.
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
        evidence: collect what the methods go by (attention, segments, groups...) in the report's
            items, for its pictures; choices and outputs stay the same.
        companion: a CLIP-like model that tells methods guided by the text how well it fits frames
            and patches; None: the language model's own embeddings do.
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
    return Attachment(
        model,
        made,
        budget,
        mask_only=mask_only,
        restore=restore,
        seed=seed,
        evidence=evidence,
        companion=companion,
    )


def refuse_hooked(model: nn.Module) -> None:
    """Raise when a recipe is attached to the model already."""
    for module in model.modules():
        if module in _HOOKED:
            raise AttachmentError(
                f"{type(model).__name__} carries {_HOOKED[module]} already; remove() that "
                'first, or compose both into one recipe: "tome@encoder + holitom".'
            )


class Attachment(OfOneModel):
    """A recipe on a model. Made by `reduce`; `remove()` or leaving the `with` block undoes it.

    Attributes:
        model: the model.
        recipe: the recipe.
        report: the account of the last call that carried visual tokens.
        plans: the frames that were chosen of what the next calls show (`Frames.plan`), one entry
            per image or video in the order of the prompt, sample by sample; None: not chosen.
            They stay until others are assigned; empty: nobody chose.
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
        evidence: bool = False,
        companion: Companion | None = None,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.mask_only = mask_only
        self.seed = seed
        self.evidence = evidence
        self.companion = companion
        self.report = Report()
        self.plans: Plans = ()
        self._adapter = adapter_for(model)
        self._budgets: tuple[Budget, ...] = ()
        self._budget = budget
        self.budget = budget
        self._handles: list[Any] = []
        self._hooked: list[nn.Module] = []
        self._watch: FeatureWatch | None = None
        self._encoder_reduction: Reduction | None = None
        self._dense: DensePrediction | None = None
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
        budgets = self.recipe.budgets(budget)
        inside = (*self.recipe.at("patches"), *self.recipe.at("encoder"))
        if any(budgets[index].num_samples is not None for index in inside):
            raise AttachmentError(
                "An encoder runs all images of a call as one batch, so its budget must be one "
                "value; give per-sample budgets to projector or decoder methods only."
            )
        self._budgets, self._budget = budgets, budget

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

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "removed"
        name = type(self.model).__name__
        return f"<foveate {self.recipe} on {name}, {describe_budget(self.budget)}, {state}>"

    def _refuse_double(self) -> None:
        if hasattr(self.model, "_orig_mod") or self.model._compiled_call_impl is not None:
            raise AttachmentError(
                "This model is compiled, and what was traced knows no hooks: attach to the model "
                "itself and do not compile it."
            )
        refuse_hooked(self.model)

    def _attach(self, restore: bool | None) -> None:
        check_kinds(self.recipe, self._adapter)
        if isinstance(self._adapter, BackboneAdapter):
            self._attach_backbone(self._adapter, bool(restore))
        elif isinstance(self._adapter, SwinAdapter):
            self._attach_windows(self._adapter)
        elif isinstance(self._adapter, EncoderAdapter):
            self._attach_encoder_alone(self._adapter, bool(restore))
        else:
            self._attach_language_model(self._adapter)
        name = str(self.recipe)
        for module in self.model.modules():
            _HOOKED[module] = name
            self._hooked.append(module)

    def _new_report(self) -> Report:
        name = type(self.model).__name__
        return Report(name, str(self.recipe), describe_budget(self.budget))

    # -- backbone -------------------------------------------------------------------------------

    def _attach_backbone(self, adapter: BackboneAdapter, restore: bool) -> None:
        stage = BackboneStage(
            self.model,
            adapter,
            self.recipe,
            lambda i: self._budgets[i],
            restore=restore,
            evidence=self.evidence,
            seed=self.seed,
        )

        @stage.when_over
        def finished(run: BackboneRun) -> None:
            self.report = self._new_report()
            stage.describe(self.report, run)
            self._encoder_reduction = run.reduction

        stage.install(self._handles)

    def _attach_windows(self, adapter: SwinAdapter) -> None:
        self._refuse_outside()
        stage = WindowStage(
            adapter.parts(self.model),
            self.recipe,
            lambda i: self._budgets[i],
            evidence=self.evidence,
            seed=self.seed,
        )

        @stage.when_over
        def finished(run: WindowRun) -> None:
            self.report = self._new_report()
            stage.describe(self.report, run)
            self._encoder_reduction = run.reduction

        stage.install(self._handles)

    # -- encoder alone --------------------------------------------------------------------------

    def _refuse_outside(self) -> None:
        outside = [step for step in self.recipe if not {"patches", "encoder"} & set(step.stages)]
        if outside:
            raise AttachmentError(
                f"{outside[0].method.name} acts at {', '.join(outside[0].stages)}, but "
                f"{type(self.model).__name__} is an encoder alone. Use an encoder-stage method "
                'such as "tome", or attach to a vision-language model.'
            )

    def _attach_encoder_alone(self, adapter: EncoderAdapter, restore: bool) -> None:
        self._refuse_outside()
        tower = adapter.tower(self.model)
        for step in self.recipe:
            step.method.check(len(tower.blocks), None)

        def finished(run: EncoderRun) -> None:
            self.report = self._new_report()
            note_encoder(self.report, self.recipe, [run])
            costs.encoder_alone(self.report, run)
            self._encoder_reduction, self._dense = run.reduction, run.dense

        costs = CostModel(self.model, has_text=False, vision=adapter.dims)

        stage = self._encoder_stage(tower, restore, finished)
        stage.install(self._handles)

    def _encoder_stage(
        self, tower: Any, restore: bool, finished: Callable[[EncoderRun], None]
    ) -> EncoderStage:
        watch = self._watch
        return EncoderStage(
            tower,
            self._encoder_steps(tower),
            lambda i: self._budgets[i],
            restore,
            finished,
            self.evidence,
            tuple if watch is None else watch.layouts,
            {i: step.stages for i, step in enumerate(self.recipe)},
            [(i, self.recipe.steps[i].method) for i in self.recipe.at("patches")],
            self.seed,
        )

    def _encoder_steps(self, tower: VisionTower) -> list[tuple[int, Method]]:
        """The steps that act inside an encoder; where it packs its images some do without."""
        steps = [(i, self.recipe.steps[i]) for i in self.recipe.at("encoder")]
        return [
            (i, step.method)
            for i, step in steps
            if not (tower.packed and step.method.encoder_optional and "projector" in step.stages)
        ]

    @property
    def encoder_reduction(self) -> Reduction | None:
        """The composed `Reduction` of the last encoder call (prefix tokens included), or None.

        `run.encoder_reduction.restore(last_hidden_state)` brings dense features back.
        """
        return self._encoder_reduction

    @property
    def dense(self) -> DensePrediction | None:
        """What a method such as "dtop" predicted for every patch in the last encoder call, or None.

        `run.dense.classes((height, width))` is a segmentation of the images.
        """
        return self._dense

    # -- language model -------------------------------------------------------------------------

    def _attach_language_model(self, adapter: Adapter) -> None:
        towers = adapter.towers(self.model)
        unique = list({id(tower): tower for tower in towers.values()}.values())
        self._check_text_model(adapter)
        num_layers = len(adapter.layers(self.model))
        for step in self.recipe:
            step.method.check(unique[0].feature_block + 1, num_layers)
        signals = self._signals(adapter, all(tower.has_cls for tower in unique))
        for tower in unique:
            self._block_reads(tower, signals)  # refuses blocks that do not exist
        stages: list[EncoderStage] = []

        def running() -> EncoderStage | None:
            return next((stage for stage in stages if stage.run is not None), None)

        self._watch = FeatureWatch(
            self.model,
            adapter,
            lambda tower: self._block_reads(tower, signals),
            running,
            lambda: self.active,
        )
        gated = bool(self.recipe.at("patches"))
        inside = [tower for tower in unique if gated or self._encoder_steps(tower)]
        if inside:
            self._check_feature_layers(adapter)
        stages += [self._encoder_stage(tower, True, self._note_encoder_run) for tower in inside]
        self._watch.install(self._handles)
        for stage in stages:
            stage.install(self._handles)
        costs = CostModel(self.model, has_text=True)

        def publish(report: Report, records: list[FeatureRecord]) -> None:
            runs = [run for record in records for run in record.encoder_runs]
            note_encoder(report, self.recipe, runs)
            costs.language_model(report, records, runs)
            self.report = report

        settings = LanguageSettings(
            recipe=self.recipe,
            budget=lambda: self._budget,
            step_budget=lambda index: self._budgets[index],
            active=lambda: self.active,
            new_report=self._new_report,
            publish=publish,
            mask_only=self.mask_only,
            seed=self.seed,
            evidence=self.evidence,
            companion=self.companion,
            plans=lambda: self.plans,
        )
        language = LanguageStage(self.model, adapter, self._watch, settings)
        language.install(self._handles)

    def _check_feature_layers(self, adapter: Adapter) -> None:
        key = adapter.feature_layer_key
        layers = getattr(adapter.base(self.model).config, key, -1) if key else -1
        if isinstance(layers, (list, tuple)) and len(layers) > 1:
            raise AttachmentError(
                f"The features of this model join the blocks {list(layers)}, which have different "
                "lengths once the encoder is shortened; encoder-stage methods need one feature "
                "layer. Use a projector or decoder method."
            )

    def _check_text_model(self, adapter: Adapter) -> None:
        config = adapter.text_config(self.model)
        refuse_unmasked(config)
        sliding = [t for t in getattr(config, "layer_types", None) or () if t != "full_attention"]
        if sliding:
            raise AttachmentError(
                f"This language model has {sliding[0]} layers, whose windows count cache slots "
                "instead of positions; reducing its prompt would move the windows. Only full "
                "attention is supported."
            )

    def _signals(self, adapter: Adapter, has_cls: bool) -> set[str]:
        """The encoder signals to compute: of alternatives, the first that this model has."""
        available = {name for name in SIGNALS if name != "encoder.cls_attention"}
        if has_cls:
            available.add("encoder.cls_attention")
        chosen: set[str] = set()
        for step in self.recipe:
            method = step.method
            # Signals of a method without a projector stage are carried to its decoder stage.
            if "projector" in method.stages() and "projector" not in step.stages:
                continue
            for need in method.needs:
                options = (need,) if isinstance(need, str) else need
                found = [name for name in options if name in available]
                if not found:
                    raise MissingSignalError(
                        method.name, tuple(options), f"{adapter.docs_name} has no [CLS] token"
                    )
                chosen.add(found[0])
        return chosen

    def _block_reads(self, tower: VisionTower, signals: set[str]) -> dict[int, BlockReads]:
        carried = {index for index, method in self._encoder_steps(tower) if method.encoder_optional}
        indices = [index for index in self.recipe.at("projector") if index not in carried]
        return block_reads(tower, [self.recipe.steps[i].method for i in indices], signals)

    def _note_encoder_run(self, run: EncoderRun) -> None:
        self._encoder_reduction, self._dense = run.reduction, run.dense
        if self._watch is not None and self._watch.current is not None:
            self._watch.current.encoder_runs.append(run)
