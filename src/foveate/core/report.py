"""What a call kept, what it cost and what it saved."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.core._files import write_text
from foveate.core.card import Stage
from foveate.core.evidence import Evidence
from foveate.core.grid import Grid, Modality
from foveate.core.reduction import Reduction
from foveate.core.timeline import Timeline

if TYPE_CHECKING:
    import torch

#: File ending -> "module:function" that writes a report; resolved when used.
WRITERS: dict[str, str] = {".html": "foveate.view.html:save_report"}


@dataclass(frozen=True)
class StageReport:
    """Tokens before and after one method at one stage, one entry per sample (or image batch)."""

    stage: Stage
    method: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    layer: int | None = None

    @property
    def retained(self) -> float:
        """Fraction kept over all samples."""
        return sum(self.after) / max(sum(self.before), 1)


@dataclass(eq=False)
class ItemReport:
    """One image or video: which of its tokens became which token of the language model.

    Attributes:
        sample: row of the batch.
        modality: "image" or "video".
        grid: layout before reduction.
        reduction: from the item's tokens to those that entered the language model (B = 1); None
            when nothing was removed.
        alive: per decoder layer that removed tokens, the indices of surviving targets.
        evidence: what methods noted, where it was asked for; values per token are over the item's
            tokens before any reduction.
        pixels: zero-argument function giving uint8 frames [T, 3, h, w] for pictures, or None.
        seconds: timestamps of the frames, if known.
        name: what people call it, such as the name of its file; "" without.
    """

    sample: int
    modality: Modality
    grid: Grid
    reduction: Reduction | None = None
    alive: dict[int, torch.Tensor] = field(default_factory=dict)
    evidence: list[Evidence] = field(default_factory=list)
    pixels: Any = None
    seconds: Sequence[float] | None = None
    name: str = ""

    def add_evidence(self, noted: Evidence) -> None:
        """Add what a method noted; pieces of one thing become one."""
        for place, earlier in enumerate(self.evidence):
            if earlier.key == noted.key:
                self.evidence[place] = noted.over(earlier)
                return
        self.evidence.append(noted)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """The first runs of frames that a method noted, (first, last) planes; () without any."""
        return next((noted.value for noted in self.evidence if noted.kind == "frames"), ())

    @property
    def before(self) -> int:
        """Tokens of the item before any reduction."""
        return self.grid.num_tokens

    @property
    def after(self) -> int:
        """Tokens of the item that entered the language model."""
        return self.before if self.reduction is None else self.reduction.num_out


@dataclass(eq=False)
class Report:
    """The account of the last call that carried visual tokens.

    Attributes:
        model: class name of the model.
        recipe: the recipe as text.
        budget: the budget as text.
        stages: one entry per method, stage and layer that removed tokens.
        items: one entry per image or video.
        prompt_lengths: tokens of each sample that entered the language model, text included.
        layer_lengths: tokens per decoder layer during prefill, per sample: [sample][layer].
        cache_lengths: keys per decoder layer after prefill, per sample: [sample][layer].
        attention_pairs: products of a query and a key per decoder layer, per sample, where a
            prompt was read in blocks; empty: the squares of `layer_lengths`.
        flops: {"untouched": {...}, "reduced": {...}} by part; see docs/flops.md for the rule.
        block_lengths: tokens in front of every block: per sample, for backbones without attention
            over patches (MixSTE, Vision Mamba, ViS4mer); of all frames or pictures, for the encoder
            in `foveate.view.show_video`.
        seconds: wall time spent in methods by stage (host time; on CUDA without synchronisation).
        notes: remarks for people.
        timeline: when each stage was at work, from the file to the answer, where it was noted.
    """

    model: str = ""
    recipe: str = ""
    budget: str = ""
    stages: list[StageReport] = field(default_factory=list)
    items: list[ItemReport] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    layer_lengths: list[list[int]] = field(default_factory=list)
    cache_lengths: list[list[int]] = field(default_factory=list)
    attention_pairs: list[list[int]] = field(default_factory=list)
    flops: dict[str, Mapping[str, float]] = field(default_factory=dict)
    block_lengths: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    timeline: Timeline | None = None

    def spend(self, stage: str, seconds: float) -> None:
        """Add to the time that the methods of a stage have taken."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @property
    def visual_before(self) -> int:
        """Visual tokens of the call before any reduction after the encoder."""
        return sum(item.before for item in self.items)

    @property
    def visual_after(self) -> int:
        """Visual tokens that entered the language model."""
        return sum(item.after for item in self.items)

    @property
    def retained(self) -> float:
        """Fraction of visual tokens that entered the language model."""
        return self.visual_after / max(self.visual_before, 1)

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data, without tensors."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "budget": self.budget,
            "visual_before": self.visual_before,
            "visual_after": self.visual_after,
            "retained": self.retained,
            "stages": [
                {
                    "stage": s.stage,
                    "method": s.method,
                    "layer": s.layer,
                    "before": list(s.before),
                    "after": list(s.after),
                    "retained": s.retained,
                }
                for s in self.stages
            ],
            "items": [
                {
                    "sample": item.sample,
                    "modality": item.modality,
                    "planes": [[p.height, p.width] for p in item.grid.planes],
                    "before": item.before,
                    "after": item.after,
                    **({"name": item.name} if item.name else {}),
                }
                for item in self.items
            ],
            "prompt_lengths": list(self.prompt_lengths),
            "layer_lengths": [list(lengths) for lengths in self.layer_lengths],
            "cache_lengths": [list(lengths) for lengths in self.cache_lengths],
            "block_lengths": list(self.block_lengths),
            "flops": {name: dict(parts) for name, parts in self.flops.items()},
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "timeline": None if self.timeline is None else self.timeline.as_dict(),
        }

    def __str__(self) -> str:
        if not self.items and not self.stages:
            return "foveate: no visual tokens seen yet"
        lines = [f"foveate: {self.recipe} on {self.model}, {self.budget}"]
        lines.append(f"{'stage':<20}{'method':<14}{'before':>9}{'after':>9}{'kept':>9}")
        for row in merge_layers(self.stages):
            lines.append(
                f"{row['stage']:<20}{row['method']:<14}{row['before']:>9}{row['after']:>9}"
                f"{row['retained']:>9.1%}"
            )
        lines.append(
            f"{'into the LLM':<34}{self.visual_before:>9}{self.visual_after:>9}"
            f"{self.retained:>9.1%}"
        )
        total = {name: part.get("total", 0.0) for name, part in self.flops.items()}
        if total.get("untouched") and "reduced" in total:
            unit, scale = _flops_unit(total["untouched"])
            lines.append(
                f"{unit:<34}{total['untouched'] / scale:>9.2f}{total['reduced'] / scale:>9.2f}"
                f"{total['reduced'] / total['untouched']:>9.1%}"
            )
        if self.seconds:
            spent = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in self.seconds.items())
            lines.append(f"spent in methods: {spent}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the report; the file ending chooses the form (.html picture, .json figures).

        Args:
            path: where to write.
            options: for .html: `frames` (uint8 [T, 3, h, w] or one per item) to draw on.

        Returns:
            The path. The file is there whole or not at all.

        Raises:
            ValueError: the ending is not known, the folder does not exist, or .json got options.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Report(recipe="holitom").save(f"{folder}/kept.json").name
            'kept.json'
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".json":
            if options:
                raise ValueError(f"A .json report takes no options, got {', '.join(options)}.")
            return write_text(path, json.dumps(self.as_dict(), indent=2) + "\n")
        target = WRITERS.get(suffix)
        if target is None:
            known = ", ".join([".json", *WRITERS])
            ending = repr(path.suffix) if path.suffix else "a file without ending"
            raise ValueError(f"Cannot write a report as {ending}; the endings are {known}.")
        module, _, attribute = target.partition(":")
        getattr(importlib.import_module(module), attribute)(self, path, **options)
        return path


def merge_layers(stages: Sequence[StageReport]) -> list[Mapping[str, Any]]:
    """Rows for people: consecutive layers of one method become one row "decoder 14-21".

    In the decoder tokens that left stay away, so a row counts from its first layer to its last; the
    caches of layers are shortened one by one, so a row counts all of them together.

    Example:
        >>> layers = [StageReport("decoder", "fastv", (8,), (4,), 2),
        ...           StageReport("decoder", "fastv", (4,), (1,), 3)]
        >>> [(row["stage"], row["before"], row["after"]) for row in merge_layers(layers)]
        [('decoder 2-3', 8, 1)]
    """
    groups: list[list[StageReport]] = []
    for stage in stages:
        last = groups[-1][-1] if groups else None
        same = last and (last.stage, last.method) == (stage.stage, stage.method)
        if last and same and stage.layer is not None and last.layer is not None:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    rows = []
    for group in groups:
        first, last = group[0], group[-1]
        label: str = first.stage
        if first.layer is not None:
            same = first.layer == last.layer
            label += f" {first.layer}" if same else f" {first.layer}-{last.layer}"
        parallel = first.stage == "cache"
        before = sum(sum(s.before) for s in group) if parallel else sum(first.before)
        after = sum(sum(s.after) for s in group) if parallel else sum(last.after)
        rows.append(
            {
                "stage": label,
                "method": first.method,
                "before": before,
                "after": after,
                "retained": after / max(before, 1),
            }
        )
    return rows


def _flops_unit(most: float) -> tuple[str, float]:
    """The unit in which a figure has one to three digits before the point."""
    for name, scale in (("TFLOPs", 1e12), ("GFLOPs", 1e9)):
        if most >= scale:
            return name, scale
    return "MFLOPs", 1e6
