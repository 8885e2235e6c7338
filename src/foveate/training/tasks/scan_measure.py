"""What the models of the task `scan` reach, and how near they stay to the dense model.

Legend: B pictures, N tokens, K of them left, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import foveate
from foveate.methods.tovim import ToPViM
from foveate.training.task import Outcome, paired_gain

#: What is asked of the fine-tuned model, in points below the untouched one.
_NEAR = 1.5
_ACCURACY, _DISTANCE = "accuracy (%)", "distance of kept tokens (%)"


@dataclass
class Measured:
    """What one run has given so far.

    Attributes:
        right: 100 for every picture that is named right, else 0.
        far: distance of the tokens that are left from the dense model's, in percent of their norm,
            for every picture; nothing for the dense model.
        share: of the untouched model's FLOPs.
    """

    right: list[Tensor] = field(default_factory=list)
    far: list[Tensor] = field(default_factory=list)
    share: float = 1.0


def measured(
    found: dict[str, Measured],
    runs: Mapping[str, tuple[str, ToPViM | None, float]],
    modules: Mapping[str, nn.Module],
    images: Tensor,
    label_B: Tensor,
) -> None:
    """Add a batch of pictures [B, 3, h, w] to what every run has given; the dense one is first."""
    whole_BNC = images
    device = next(modules["dense"].parameters()).device
    for name, (model, method, retain) in runs.items():
        if method is None:
            out = modules[model](images.to(device))
            whole_BNC = out.last_hidden_state
        else:
            with foveate.reduce(modules[model], method, retain=retain) as run:
                out = modules[model](images.to(device))
            flops, reduction = run.report.flops, run.encoder_reduction
            assert reduction is not None
            found[name].share = flops["reduced"]["total"] / flops["untouched"]["total"]
            found[name].far.append(distance(out.last_hidden_state, whole_BNC, reduction.anchor_BM))
        found[name].right.append(100.0 * (out.logits.argmax(-1).cpu() == label_B))


def distance(left_BKC: Tensor, whole_BNC: Tensor, place_BK: Tensor) -> Tensor:
    """Distance of what is left from the same tokens of the dense model, in percent of these, [B].

    Example:
        >>> whole = torch.tensor([[[1.0], [3.0], [4.0]]])
        >>> distance(torch.tensor([[[3.0], [3.0]]]), whole, torch.tensor([[1, 2]])).item()
        20.0
    """
    there_BKC = whole_BNC.gather(1, place_BK[..., None].expand(-1, -1, whole_BNC.shape[2]))
    off_B = (left_BKC - there_BKC).flatten(1).norm(dim=1)
    return 100 * (off_B / there_BKC.flatten(1).norm(dim=1)).cpu()


def outcome_rows(found: Mapping[str, Measured], retain: float, fewer: float) -> list[Outcome]:
    """The outcomes with their bars."""
    recipes = {"untouched": "untouched"}
    for suffix, kept in (("", retain), (", fewer", fewer)):
        recipes |= {
            f"aligned{suffix}": f"tovim(retain={kept}), no training",
            f"naive{suffix}": f"tovim(align=False, retain={kept}), no training",
            f"random{suffix}": f"random patches, {kept} kept, no training",
        }
    recipes |= {
        "tuned aligned": f"tovim(retain={retain}), fine-tuned",
        "tuned naive": f"tovim(align=False, retain={retain}), fine-tuned",
    }
    right = {name: torch.cat(run.right) for name, run in found.items()}
    rows = []
    for name, recipe in recipes.items():
        other, bar, met = "untouched", "", None
        if name.startswith("aligned"):
            other = name.replace("aligned", "naive")
            gain, error = paired_gain(right[name], right[other])
            bar, met = "above naive (align=False), by two standard errors", gain > 2 * error
        elif name == "tuned aligned":
            bar = f"within {_NEAR} points of untouched"
            met = paired_gain(right[name], right["untouched"])[0] >= -_NEAR
        note = "" if name == other else _versus(right[name], right[other], other.split(",")[0])
        value, share = float(right[name].mean()), found[name].share
        rows.append(Outcome(recipe, _ACCURACY, value, share, bar, met, note=note))
    return rows + _distance_rows(found, recipes)


def _distance_rows(found: Mapping[str, Measured], recipes: Mapping[str, str]) -> list[Outcome]:
    """How far the tokens that are left are from the dense model's, before fine-tuning."""
    rows = []
    for name in ("aligned", "naive", "aligned, fewer", "naive, fewer"):
        far, bar, met, note = torch.cat(found[name].far), "", None, ""
        if name.startswith("aligned"):
            nearer, error = paired_gain(torch.cat(found[name.replace("aligned", "naive")].far), far)
            bar, met = "below naive (align=False), by two standard errors", nearer > 2 * error
            note = f"{-nearer:+.2f} points against naive, standard error {error:.2f}"
        value, share = float(far.mean()), found[name].share
        rows.append(Outcome(recipes[name], _DISTANCE, value, share, bar, met, note=note))
    return rows


def _versus(right_N: Tensor, other_N: Tensor, name: str) -> str:
    gain, error = paired_gain(right_N, other_N)
    return f"{gain:+.2f} points against {name}, standard error {error:.2f}"
