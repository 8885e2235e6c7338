"""What training-free methods keep of the networks of the task `shapes`, on held-out pictures.

Legend: B pictures, N tokens, P patches, C channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.training.loop import Tell
from foveate.training.task import Outcome, standard_error
from foveate.training.tasks.shapes_bench import TIME, Bench, HeldOut, Pass, asked, noted, times
from foveate.training.tasks.shapes_data import NEEDLE_RADII
from foveate.training.tasks.shapes_trained import TAUS, exits, semantic

NEEDLES, MOSAICS = "needles kept (%)", "mosaics"
#: Held-out pictures come from these streams; those of training are numbered from 0.
_PICTURES, _NEEDLES, _MOSAICS = 100, 101, 102
#: Drawing at random: as many patches leave every block, whichever they are.
_RANDOM = {"score": "random", "alpha": 0.0}
#: Three reductions in place of one in every block.
_THREE = {"layers": (0.25, 0.5, 0.75)}
#: Method and options of the rows of a budget curve.
_CURVE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("zero_tprune", {}),
    ("gtp_vit", {}),
    ("token_transforming", {}),
    ("tome", {}),
    ("gtp_vit", _RANDOM),
)


def all_rows(
    modules: dict[str, nn.Module],
    seed: int,
    count: int,
    retains: tuple[float, ...],
    rounds: int,
    tell: Tell,
) -> list[Outcome]:
    """The rows of the card.

    Args:
        modules: as the task builds them, in eval mode.
        seed: of the task.
        count: held-out pictures; as many needles and three times as many mosaics.
        retains: budgets of the curve, fractions of the patches that leave the last block.
        rounds: of timing; 0: none.
        tell: as of `Task.measure`.
    """
    device = next(modules["trunk"].parameters()).device
    held = HeldOut.draw(seed, _PICTURES, count, device)
    total = 25 + 4 * (rounds > 0) + len(TAUS) + len(_CURVE) * len(retains)
    bench = Bench(modules, held, tell, total)
    untouched = bench.accuracy(Pass(bench.trunk, held))
    rows = [untouched, *pruned(bench, untouched), *merged(bench, untouched)]
    if rounds:
        rows += timed(bench, rounds)
    rows += [*propagated(bench, seed, 3 * count), *curve(bench, retains)]
    lone = {"clutter": (0.0, 0.0), "radii": NEEDLE_RADII}
    rows += needles(bench, HeldOut.draw(seed, _NEEDLES, count, device, **lone))
    dense = bench.segmented(Pass(bench.trunk, held))
    return [*rows, dense, *exits(bench), *semantic(bench, untouched, dense)]


def pruned(bench: Bench, untouched: Outcome) -> list[Outcome]:
    """zero_tprune at 65 % of the FLOPs, and what it is compared with."""
    random = bench.accuracy(bench.at_share("gtp_vit", 0.65, **_RANDOM))
    tome = bench.accuracy(bench.at_share("tome", 0.65))
    row = bench.accuracy(bench.at_share("zero_tprune", 0.65))
    good = row.value > random.value and untouched.value - row.value <= 1.5
    bar = "35 % fewer FLOPs: within 1.5 points, better than random"
    notes = bench.against(row, untouched), bench.against(row, random)
    return [asked(row, bar, good, *notes), random, tome]


def merged(bench: Bench, untouched: Outcome) -> list[Outcome]:
    """token_transforming at 60 % of the FLOPs, and what it is compared with."""
    random = bench.accuracy(bench.at_share("gtp_vit", 0.6, **_RANDOM))
    tome = bench.accuracy(bench.at_share("tome", 0.6))
    bar = "40 % fewer FLOPs: within 1 point, not below ToMe"
    rows = []
    for options in ({}, _THREE):
        row = bench.accuracy(bench.at_share("token_transforming", 0.6, **options))
        good = row.value >= tome.value and untouched.value - row.value <= 1
        rows.append(asked(row, bar, good, bench.against(row, untouched), bench.against(row, tome)))
    return [*rows, tome, random]


def timed(bench: Bench, rounds: int) -> list[Outcome]:
    """What the FLOPs that `merged` saves are worth in time."""
    shorter = [
        bench.at_share(name, 0.6, **options)
        for name, options in (
            ("token_transforming", {}),
            ("token_transforming", _THREE),
            ("tome", {}),
        )
    ]
    first, *took = times([Pass(bench.trunk, bench.held), *shorter], rounds)
    rows = [Outcome("untouched", TIME, first, 1.0)]
    for run, value in zip(shorter, took, strict=True):
        run.held = run.held.first(1)
        list(run)  # counts its FLOPs
        row = noted(
            Outcome(run.recipe, TIME, value, run.share()), f"{first / value:.2f} times as fast"
        )
        is_bar = run.method == "token_transforming"
        rows.append(asked(row, "40 % fewer FLOPs: faster", value < first) if is_bar else row)
    return [bench.told(row) for row in rows]


def propagated(bench: Bench, seed: int, count: int) -> list[Outcome]:
    """gtp_vit with 8 and 16 patches leaving every block, handed on and not, on mosaics."""
    vit = bench.modules["mosaic"]
    held = HeldOut.mosaics(seed, _MOSAICS, count, bench.held.pixels_B3SS.device)
    layers, num = int(vit.config.num_hidden_layers), held.patch_BP.shape[1]  # pyright: ignore

    def row_of(method: str, **options: Any) -> Outcome:
        return bench.accuracy(Pass(vit, held, method, options), "mosaic_classify", MOSAICS)

    untouched, rows = row_of(""), []
    for leaving in (8, 16):
        tokens = num - leaving * layers
        plain, row = row_of("gtp_vit", tokens=tokens, alpha=0.0), row_of("gtp_vit", tokens=tokens)
        more, said = bench.dearer(row, plain)
        good = row.value > plain.value and more < 0
        bar = "8 patches a block: better than without propagation (alpha = 0)"
        row = asked(row, bar, good, bench.against(row, plain), said)
        rows += [row if leaving == 8 else replace(row, bar="", met=None), plain]
        rows.append(row_of("gtp_vit", tokens=tokens, **_RANDOM))
    return [untouched, *rows]


def curve(bench: Bench, retains: tuple[float, ...]) -> list[Outcome]:
    """Every training-free method at a few budgets."""
    return [
        bench.accuracy(Pass(bench.trunk, bench.held, name, {"retain": retain, **options}))
        for name, options in _CURVE
        for retain in retains
    ]


def needles(bench: Bench, held: HeldOut) -> list[Outcome]:
    """How often a patch is left that shows a small lone shape, and whether its class is found."""
    assert held.shown_BP is not None
    shows_BP, fullest_B1 = main_patches(held.shown_BP), held.shown_BP.argmax(1, keepdim=True)
    before_B = _classes(bench, Pass(bench.trunk, held))[0]
    rows = []
    everyone = {"low": 0.0, "high": 1000.0}  # no head is left out
    for method, options in (("zero_tprune", {}), ("zero_tprune", everyone), ("gtp_vit", _RANDOM)):
        run = Pass(bench.trunk, held, method, bench.at_share(method, 0.65, **options).options)
        class_B, left_BP = _classes(bench, run)
        assert left_BP is not None
        kept_B = (left_BP & shows_BP).any(1).double()
        note = (
            f"standard error {100 * standard_error(kept_B):.2f}; its fullest patch in "
            f"{left_BP.gather(1, fullest_B1).double().mean():.1%}; class found in "
            f"{_share(class_B, held.label_B)}, untouched in {_share(before_B, held.label_B)}"
        )
        value = 100 * kept_B.mean().item()
        rows.append(Outcome(run.recipe, NEEDLES, value, run.share(), on="one needle", note=note))
    bar = "35 % fewer FLOPs: keeps 95 % of the needles"
    rows[0] = asked(rows[0], bar, rows[0].value >= 95)
    return [bench.told(row) for row in rows]


def main_patches(shown_BP: Tensor) -> Tensor:
    """Which patches show at least half as much of a shape as the one that shows most, bool [B, P].

    Args:
        shown_BP: fraction of every patch that the shape covers.

    Example:
        >>> main_patches(torch.tensor([[0.0, 0.3, 0.8, 0.4]])).tolist()
        [[False, False, True, True]]
    """
    return shown_BP >= shown_BP.amax(1, keepdim=True) / 2


def _classes(bench: Bench, run: Pass) -> tuple[Tensor, Tensor | None]:
    """The class that is found of every picture, and which patches are left to the end."""
    classes, left = [], []
    for _, x_BNC, attached in run:
        classes.append(bench.modules["classify"](x_BNC[:, 0]).argmax(1))
        if attached is not None:
            assert attached.encoder_reduction is not None
            left.append(attached.encoder_reduction.groups_BN[:, 1:] >= 0)
    return torch.cat(classes), torch.cat(left) if left else None


def _share(found_B: Tensor, true_B: Tensor) -> str:
    return f"{(found_B == true_B).double().mean():.1%}"
