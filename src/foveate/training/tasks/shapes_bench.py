"""How methods are measured on the networks of the task `shapes`: held-out pictures, passes, rows.

Legend: B pictures, N tokens, P patches, K classes, T textures, C channels, h and w rows and columns
of patches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import foveate
from foveate.attach import Attachment
from foveate.training.loop import Tell
from foveate.training.task import Outcome, numbers_of, paired_gain, standard_error
from foveate.training.tasks.shapes_data import NUM_CLASSES, draw_mosaics, draw_pictures

ACCURACY, MIOU, TIME = "accuracy (%)", "mIoU (%)", "time of a picture (ms)"
_CHUNK = 32


@dataclass(frozen=True)
class HeldOut:
    """Pictures that no training has seen, from flat to cluttered.

    Attributes:
        pixels_B3SS: float32.
        label_B: int64.
        patch_BP: class of every patch, int64.
        shown_BP: fraction of every patch that the marked shape covers; None in mosaics.
        share_BT: fraction of every picture that each texture covers, in mosaics.
    """

    pixels_B3SS: Tensor
    label_B: Tensor
    patch_BP: Tensor
    shown_BP: Tensor | None = None
    share_BT: Tensor | None = None

    @classmethod
    def draw(cls, seed: int, stream: int, count: int, device: torch.device, **kind: Any) -> HeldOut:
        """New ones; `kind` as in `draw_pictures`."""
        drawn = draw_pictures(numbers_of(seed, stream), count, **kind)
        order_B = drawn.clutter_B.argsort(kind="stable")
        pixels, label, patch, shown = (
            torch.from_numpy(x[order_B]).to(device)
            for x in (drawn.pixels_B3SS, drawn.label_B, drawn.patch_Bhw, drawn.marked_Bhw)
        )
        return cls(pixels, label, patch.flatten(1), shown.flatten(1))

    @classmethod
    def mosaics(cls, seed: int, stream: int, count: int, device: torch.device) -> HeldOut:
        """New mosaics; the label is the texture that covers most."""
        drawn = draw_mosaics(numbers_of(seed, stream), count)
        pixels, share, patch = (
            torch.from_numpy(x).to(device)
            for x in (drawn.pixels_B3SS, drawn.share_BT, drawn.patch_Bhw)
        )
        return cls(pixels, share.argmax(1), patch.flatten(1), share_BT=share)

    def first(self, count: int) -> HeldOut:
        """So many of them."""
        return HeldOut(*(None if x is None else x[:count] for x in vars(self).values()))  # pyright: ignore

    @property
    def target(self) -> Tensor:
        """What a classification is held against: labels or shares."""
        return self.label_B if self.share_BT is None else self.share_BT


@dataclass
class Pass:
    """A model run over held-out pictures with a method attached, chunk by chunk.

    Attributes:
        model: a transformers ViT.
        held: the pictures.
        method: name; empty: untouched.
        options: of `foveate.reduce`.
        untouched: FLOPs of every chunk without the method.
        reduced: and with it.
        heads: FLOPs of dtop's heads.
    """

    model: nn.Module
    held: HeldOut
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    untouched: list[float] = field(default_factory=list)
    reduced: list[float] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Attachment | None]]:
        """Which pictures, what leaves the encoder [B, N, C], and the attachment."""
        for first in range(0, len(self.held.label_B), _CHUNK):
            part = slice(first, first + _CHUNK)
            pixels_B3SS = self.held.pixels_B3SS[part]
            if not self.method:
                yield part, self.model(pixels_B3SS).last_hidden_state, None
                continue
            with foveate.reduce(self.model, self.method, **self.options) as run:
                x_BNC = self.model(pixels_B3SS).last_hidden_state
                self.untouched.append(run.report.flops["untouched"]["total"])
                self.reduced.append(run.report.flops["reduced"]["total"])
                self.heads.append(0 if run.dense is None else run.dense.flops)
                yield part, x_BNC, run

    def share(self, part: slice = slice(None)) -> float:
        """Fraction of the untouched FLOPs, over some of the chunks."""
        return sum(self.reduced[part]) / sum(self.untouched[part]) if self.method else 1.0

    def seconds(self) -> float:
        """Per picture of the first 32 with the method attached; attaching is not counted."""
        pixels_B3SS = self.held.pixels_B3SS[:_CHUNK]
        attached = foveate.reduce(self.model, self.method, **self.options) if self.method else None
        with attached or nullcontext():
            begun = time.perf_counter()
            self.model(pixels_B3SS)
            return (time.perf_counter() - begun) / len(pixels_B3SS)

    @property
    def recipe(self) -> str:
        """As a user writes it."""
        shown = {
            k: v for k, v in self.options.items() if k not in ("heads", "weights", "num_heads")
        }
        said = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return self.method + (f"({said})" if said else "") if self.method else "untouched"


class Bench:
    """Makes single rows of the card.

    Args:
        modules: as the task builds them, in eval mode.
        held: pictures of most of the rows.
        tell: as of `Task.measure`.
        total: rows to be made, for `tell`.
    """

    def __init__(
        self, modules: dict[str, nn.Module], held: HeldOut, tell: Tell, total: int
    ) -> None:
        self.modules, self.trunk, self.held = modules, modules["trunk"], held
        self.tell, self.done, self.total = tell, 0, total
        self._tokens: dict[tuple[str, float, str], int] = {}
        self._right_B: dict[tuple[str, str], Tensor] = {}
        self._cost_B: dict[tuple[str, str], Tensor] = {}

    def accuracy(self, run: Pass, classify: str = "classify", on: str = "") -> Outcome:
        """Share of pictures whose class is found."""
        label_BK = torch.cat([self.modules[classify](x_BNC[:, 0]) for _, x_BNC, _ in run])
        right_B = (label_BK.argmax(1) == run.held.label_B).double()
        key = on, run.recipe
        self._right_B[key] = right_B
        self._cost_B[key] = cross_entropy(label_BK, run.held.target, reduction="none").double()
        value = 100 * right_B.mean().item()
        note = f"standard error {100 * standard_error(right_B):.2f}" if not run.method else ""
        return self.told(Outcome(run.recipe, ACCURACY, value, run.share(), on=on, note=note))

    def segmented(self, run: Pass, segment: str = "segment") -> Outcome:
        """Mean over classes of intersection by union, over patches."""
        value = self.iou(run, segment)
        return self.told(Outcome(run.recipe, MIOU, value, run.share()))

    def iou(self, run: Pass, segment: str = "segment") -> float:
        """The same as a number, in percent."""
        pairs_KK = torch.zeros(1, dtype=torch.float64, device=run.held.patch_BP.device)
        for part, x_BNC, attached in run:
            if attached is not None and attached.dense is not None:
                found_BP = attached.dense.classes().flatten(1)
            else:
                found_BP = self.modules[segment](x_BNC[:, 1:]).argmax(2)
            pairs_KK = pairs_KK + _pairs(run.held.patch_BP[part], found_BP)
        return mean_iou(pairs_KK)

    def at_share(self, method: str, share: float, **options: Any) -> Pass:
        """A pass with the largest number of tokens that costs at most this share of the FLOPs."""
        key = method, share, repr(options)
        if key not in self._tokens:
            one, low, high = self.held.first(1), 1, self.held.patch_BP.shape[1]
            while low < high:
                middle = (low + high + 1) // 2
                trial = Pass(self.trunk, one, method, {"tokens": middle, **options})
                list(trial)
                low, high = (middle, high) if trial.share() <= share else (low, middle - 1)
            self._tokens[key] = low
        return Pass(self.trunk, self.held, method, {"tokens": self._tokens[key], **options})

    def against(self, row: Outcome, other: Outcome) -> str:
        """The difference in accuracy of two rows on the same pictures, with its standard error."""
        right_B, other_B = (self._right_B[one.on, one.recipe] for one in (row, other))
        points, error = paired_gain(100 * right_B, 100 * other_B)
        return f"{points:+.2f} ± {error:.2f} points against {other.recipe}"

    def dearer(self, row: Outcome, other: Outcome) -> tuple[float, str]:
        """By how much the cross-entropy of a row is higher, as a number and in words."""
        cost_B, other_B = (self._cost_B[one.on, one.recipe] for one in (row, other))
        costs = f"cross-entropy {cost_B.mean():.4f} against {other_B.mean():.4f}"
        more, error = paired_gain(cost_B, other_B)
        return more, f"{costs} ({more:+.5f} ± {error:.5f})"

    def told(self, row: Outcome) -> Outcome:
        """The row, reported."""
        self.done += 1
        self.tell("evaluation", self.done, self.total, {})
        return row


def times(runs: Sequence[Pass], rounds: int) -> list[float]:
    """Milliseconds of a picture in every pass: medians of alternating runs over 32 pictures."""
    # The first round warms up.
    found_RX = [[run.seconds() for run in runs] for _ in range(rounds + 1)][1:]
    return [1000 * median(found) for found in zip(*found_RX, strict=True)]


def mean_iou(pairs_KK: Tensor) -> float:
    """Mean over classes of intersection by union, in percent; classes that never occur count not.

    Args:
        pairs_KK: numbers of patches by true and found class.

    Example:
        >>> mean_iou(torch.tensor([[3.0, 1.0], [0.0, 4.0]]))
        77.5
    """
    hit_K = pairs_KK.diagonal()
    union_K = pairs_KK.sum(0) + pairs_KK.sum(1) - hit_K
    return round(100 * (hit_K / union_K.clamp_min(1))[union_K > 0].mean().item(), 3)


def _pairs(true_BP: Tensor, found_BP: Tensor) -> Tensor:
    index = (true_BP * NUM_CLASSES + found_BP).flatten()
    return torch.bincount(index, minlength=NUM_CLASSES**2).view(NUM_CLASSES, -1).double()


def asked(row: Outcome, bar: str, met: bool, *notes: str) -> Outcome:
    """A row with what is asked of it; notes are joined."""
    return replace(noted(row, *notes), bar=bar, met=bool(met))


def noted(row: Outcome, *notes: str) -> Outcome:
    """A row with more to know about it."""
    return replace(row, note="; ".join(note for note in (row.note, *notes) if note))
