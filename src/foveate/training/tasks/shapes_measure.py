"""What methods keep of the networks of the task `shapes`, on held-out pictures.

Legend: B pictures, N tokens, P patches, K classes, C channels, h and w rows and columns of patches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import foveate
from foveate.attach import Attachment
from foveate.training.loop import Tell
from foveate.training.task import Outcome, standard_error
from foveate.training.tasks.shapes_data import NUM_CLASSES, draw_pictures
from foveate.training.tasks.shapes_model import EARLY, IMAGE_BLOCKS, PLANE

ACCURACY, MIOU, NEEDLES = "accuracy (%)", "mIoU (%)", "needles kept (%)"
_PATCHES = PLANE[0] * PLANE[1]
_CHUNK = 32
#: Held-out pictures come from these streams; those of training are numbered from 0.
_PICTURES, _NEEDLES = 100, 101
#: Half extents in pixels of needles, smaller than any shape of the training.
_NEEDLE_RADII = (3.0, 4.0)
#: Drawing at random: as many patches leave every block, whichever they are.
_RANDOM = {"score": "random", "alpha": 0.0}
#: Method and options of the rows of a budget curve.
_CURVE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("zero_tprune", {}),
    ("gtp_vit", {}),
    ("token_transforming", {}),
    ("tome", {}),
    ("gtp_vit", _RANDOM),
)
#: dtop's thresholds; the bars are asked of the first, the published one.
_TAUS = (0.9, 0.95, 0.99, 0.995, 0.998)


@dataclass(frozen=True)
class HeldOut:
    """Pictures that no training has seen, from flat to cluttered.

    Attributes:
        pixels_B3SS: float32.
        label_B: int64.
        patch_BP: class of every patch, int64.
        shown_BP: fraction of every patch that the marked shape covers.
    """

    pixels_B3SS: Tensor
    label_B: Tensor
    patch_BP: Tensor
    shown_BP: Tensor

    @classmethod
    def draw(cls, seed: int, stream: int, count: int, device: torch.device, **kind: Any) -> HeldOut:
        """New ones; `kind` as in `draw_pictures`."""
        drawn = draw_pictures(np.random.Generator(np.random.PCG64([seed, stream])), count, **kind)
        order_B = drawn.clutter_B.argsort(kind="stable")
        pixels, label, patch, shown = (
            torch.from_numpy(x[order_B]).to(device)
            for x in (drawn.pixels_B3SS, drawn.label_B, drawn.patch_Bhw, drawn.marked_Bhw)
        )
        return cls(pixels, label, patch.flatten(1), shown.flatten(1))


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

    @property
    def recipe(self) -> str:
        """As a user writes it."""
        shown = {
            k: v for k, v in self.options.items() if k not in ("heads", "weights", "num_heads")
        }
        said = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return self.method + (f"({said})" if said else "") if self.method else "untouched"


class Bench:
    """The rows of the card.

    Args:
        modules: as the task builds them, in eval mode.
        seed: of the task.
        count: held-out pictures.
        retains: budgets of the curve, fractions of the patches that leave the last block.
        tell: as of `Task.measure`.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        seed: int,
        count: int,
        retains: tuple[float, ...],
        tell: Tell,
    ) -> None:
        self.modules, self.trunk, self.retains, self.tell = modules, modules["trunk"], retains, tell
        device = next(self.trunk.parameters()).device
        self.held = HeldOut.draw(seed, _PICTURES, count, device)
        self.needles = HeldOut.draw(
            seed, _NEEDLES, count // 4, device, clutter=(0.0, 0.0), radii=_NEEDLE_RADII
        )
        self.done = 0
        self.right_B: dict[str, Tensor] = {}
        self.cost: dict[str, float] = {}

    def rows(self) -> list[Outcome]:
        """All of them."""
        untouched = self.accuracy(Pass(self.trunk, self.held))
        rows = [untouched, *self.pruned(untouched), *self.merged(untouched)]
        rows += [*self.propagated(untouched), *self.curve(), *self.kept_needles()]
        dense = self.segmented(Pass(self.trunk, self.held))
        return [*rows, dense, *self.exits(), *self.semantic(untouched, dense)]

    # -- single rows ----------------------------------------------------------------------------

    def accuracy(self, run: Pass, classify: str = "classify") -> Outcome:
        """Share of pictures whose class is found."""
        label_BK = torch.cat([self.modules[classify](x_BNC[:, 0]) for _, x_BNC, _ in run])
        right_B = (label_BK.argmax(1) == self.held.label_B).double()
        self.right_B[run.recipe] = right_B
        self.cost[run.recipe] = cross_entropy(label_BK, self.held.label_B).item()
        value = 100 * right_B.mean().item()
        note = f"standard error {100 * standard_error(right_B):.2f}" if not run.method else ""
        return self._told(Outcome(run.recipe, ACCURACY, value, run.share(), note=note))

    def segmented(self, run: Pass, segment: str = "segment") -> Outcome:
        """Mean over classes of intersection by union, over patches."""
        value = self.iou(run, segment)
        return self._told(Outcome(run.recipe, MIOU, value, run.share()))

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
        one = HeldOut(*(x[:1] for x in vars(self.held).values()))
        low, high = 1, _PATCHES
        while low < high:
            middle = (low + high + 1) // 2
            trial = Pass(self.trunk, one, method, {"tokens": middle, **options})
            list(trial)
            low, high = (middle, high) if trial.share() <= share else (low, middle - 1)
        return Pass(self.trunk, self.held, method, {"tokens": low, **options})

    def against(self, row: Outcome, other: Outcome) -> str:
        """The difference in accuracy of two rows on the same pictures, with its standard error."""
        more_B = self.right_B[row.recipe] - self.right_B[other.recipe]
        points, error = 100 * more_B.mean().item(), 100 * standard_error(more_B)
        return f"{points:+.2f} ± {error:.2f} points against {other.recipe}"

    def _told(self, row: Outcome) -> Outcome:
        self.done += 1
        self.tell("evaluation", self.done, 16 + len(_TAUS) + len(_CURVE) * len(self.retains), {})
        return row

    # -- training-free --------------------------------------------------------------------------

    def pruned(self, untouched: Outcome) -> list[Outcome]:
        """zero_tprune at 65 % of the FLOPs, and what it is compared with."""
        random = self.accuracy(self.at_share("gtp_vit", 0.65, **_RANDOM))
        tome = self.accuracy(self.at_share("tome", 0.65))
        row = self.accuracy(self.at_share("zero_tprune", 0.65))
        good = row.value > random.value and untouched.value - row.value <= 1.5
        bar = "35 % fewer FLOPs: within 1.5 points, better than random"
        notes = self.against(row, untouched), self.against(row, random)
        return [_asked(row, bar, good, *notes), random, tome]

    def merged(self, untouched: Outcome) -> list[Outcome]:
        """token_transforming at 60 % of the FLOPs, and what it is compared with."""
        random = self.accuracy(self.at_share("gtp_vit", 0.6, **_RANDOM))
        tome = self.accuracy(self.at_share("tome", 0.6))
        row = self.accuracy(self.at_share("token_transforming", 0.6))
        good = row.value >= tome.value and untouched.value - row.value <= 1
        bar = "40 % fewer FLOPs: within 1 point, not below ToMe"
        notes = self.against(row, untouched), self.against(row, tome)
        return [_asked(row, bar, good, *notes), tome, random]

    def propagated(self, untouched: Outcome) -> list[Outcome]:
        """gtp_vit with 8 patches leaving every block, handed on and not; and with 20."""
        layers, rows = int(self.trunk.config.num_hidden_layers), []  # pyright: ignore
        for leaving in (8, 20):
            options = {"tokens": _PATCHES - leaving * layers}
            plain = self.accuracy(Pass(self.trunk, self.held, "gtp_vit", {**options, "alpha": 0.0}))
            row = self.accuracy(Pass(self.trunk, self.held, "gtp_vit", options))
            costs = [self.cost[run.recipe] for run in (row, plain)]
            note = f"cross-entropy {costs[0]:.4f} against {costs[1]:.4f}"
            notes = self.against(row, untouched), self.against(row, plain), note
            bar = "8 patches a block: better than without propagation (alpha = 0)"
            row = _asked(row, bar, row.value > plain.value, *notes)
            rows += [row if leaving == 8 else replace(row, bar="", met=None), plain]
        return rows

    def curve(self) -> list[Outcome]:
        """Every training-free method at a few budgets."""
        return [
            self.accuracy(Pass(self.trunk, self.held, name, {"retain": retain, **options}))
            for name, options in _CURVE
            for retain in self.retains
        ]

    def kept_needles(self) -> list[Outcome]:
        """How often the patch that shows most of a small lone shape is left."""
        place_B1 = self.needles.shown_BP.argmax(1, keepdim=True) + 1  # behind [CLS]
        rows = []
        for method, options in (("zero_tprune", {}), ("gtp_vit", _RANDOM)):
            found = self.at_share(method, 0.65, **options)
            run, left = Pass(self.trunk, self.needles, method, found.options), []
            for part, _, attached in run:
                assert attached is not None and attached.encoder_reduction is not None
                left.append(attached.encoder_reduction.groups_BN.gather(1, place_B1[part]) >= 0)
            value = 100 * torch.cat(left).double().mean().item()
            rows.append(Outcome(run.recipe, NEEDLES, value, run.share(), on="one needle"))
        bar = "35 % fewer FLOPs: keeps 95 % of the needles"
        return [_asked(rows[0], bar, rows[0].value >= 95), self._told(rows[1])]

    # -- trained --------------------------------------------------------------------------------

    def exits(self) -> list[Outcome]:
        """dtop's heads on the trunk at all thresholds; flat pictures against cluttered ones."""
        heads = self.modules["masks"]
        assert isinstance(heads, nn.ModuleList)
        rows: list[Outcome] = []
        runs: list[Pass] = []
        for tau in (1.0, *_TAUS):
            options = {"tau": tau, "after": EARLY, "heads": tuple(heads)}
            runs.append(Pass(self.trunk, self.held, "dtop", options))
            row = self.segmented(runs[-1])
            share = sum(runs[-1].reduced + runs[-1].heads) / sum(runs[0].reduced + runs[0].heads)
            rows.append(replace(row, note=f"with the heads {share:.1%} of tau=1"))
        run, (dense, row) = runs[1], rows[:2]
        good = dense.value - row.value <= 1 and run.share() <= 0.8
        rows[1] = _asked(row, "20 % fewer FLOPs: within 1 point of tau=1", good)
        quarter = max(1, len(run.reduced) // 4)
        flat, cluttered = run.share(slice(quarter)), run.share(slice(-quarter, None))
        less = partial(Outcome, run.recipe, "FLOPs (%)")
        bar = "flat pictures cost less than cluttered ones"
        rows.append(less(100 * flat, flat, bar, flat < cluttered, "flattest quarter"))
        return [*rows, less(100 * cluttered, cluttered, on="most cluttered quarter")]

    def semantic(self, untouched: Outcome, dense: Outcome) -> list[Outcome]:
        """stvit's network: class from 16 semantic tokens, patches from what is recovered."""
        vit = self.modules["semantic"]
        heads = int(vit.config.num_attention_heads)  # pyright: ignore
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "stvit.safetensors")
            save_file(stvit_weights(self.modules), file)
            options = {"after": IMAGE_BLOCKS, "weights": file, "num_heads": heads}
            run = Pass(vit, self.held, "stvit", options)
            row = self.accuracy(run, "semantic_classify")
            good = untouched.value - row.value <= 1 and run.share() <= 0.55
            note = self.against(row, untouched)
            row = _asked(row, "45 % fewer FLOPs: within 1 point", good, note)
            full = Pass(vit, self.held, "stvit", {**options, "restore": True})
            patches = self.segmented(full, "semantic_segment")
        share = full.share() + recover_flops(self.modules, len(self.held.label_B)) / sum(
            full.untouched
        )
        good = dense.value - patches.value <= 2
        patches = replace(patches, flops=share)
        note = "the block that recovers included"
        return [row, _asked(patches, "recovered: within 2 points", good, note)]


def stvit_weights(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Learned centres and the block that recovers, by the names that stvit reads."""
    parts = {**modules["centres"].state_dict()}
    parts |= {f"recover.{name}": x for name, x in modules["recover"].state_dict().items()}
    return {name: x.detach().cpu().clone() for name, x in parts.items()}


def recover_flops(modules: dict[str, nn.Module], count: int) -> float:
    """FLOPs of the block that recovers, which no report counts, for so many pictures."""
    block: Any = modules["recover"]
    hidden, width = block.mlp.fc1.weight.shape
    num = block_tokens(modules)
    # Projections and MLP of all patches, keys and values of the semantic tokens, attention.
    linear = _PATCHES * (2 * width * width + 2 * width * hidden) + num * 2 * width * width
    return 2.0 * count * (linear + 2 * _PATCHES * num * width)


def block_tokens(modules: dict[str, nn.Module]) -> int:
    """Semantic tokens of a picture."""
    return modules["centres"].state_dict()["global_tokens"].shape[1]


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


def _asked(row: Outcome, bar: str, met: bool, *notes: str) -> Outcome:
    said = "; ".join(note for note in (row.note, *notes) if note)
    return replace(row, bar=bar, met=bool(met), note=said)
