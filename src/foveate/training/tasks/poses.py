"""A MixSTE that lifts poses to 3D, and HoT on it.

Legend: B clips, F frames, K frames kept, J joints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import foveate
from foveate import ops
from foveate.core import EncoderContext, Reduction, Tokens
from foveate.methods.hot import HoT, pose_loss
from foveate.models.backbones import MixSTE, MixSTEConfig
from foveate.training.loop import Tell
from foveate.training.sizes import Stage
from foveate.training.task import Outcome, Task, TaskSize
from foveate.training.tasks.poses_data import make_clips

#: Frames of a clip, frames kept, and the pair of blocks in front of which the others leave.
FRAMES, KEPT, LAYER = 27, 9, 1
#: Streams of random numbers: training of the first stage, of those behind it, and held-out clips.
_FIRST, _THEN, _HELD_OUT = range(3)
#: What is asked of HoT's error, over the untouched model's.
_NEAR = 1.05
_METRIC = "error (mm)"


@dataclass(frozen=True)
class UniformFrames(HoT):
    """HoT with frames at equal distances in place of density peaks: what it is compared with."""

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Choose the frames; tokens [B, F, C]."""
        num_frames = tokens.num_tokens
        index_K = ops.uniform_indices(
            num_frames,
            self.count_frames(num_frames, context.budget),
            tokens.x_BND.device,
            endpoints=False,
        )
        return Reduction.select(index_K.expand(len(tokens.x_BND), -1), num_frames)


class Poses(Task):
    """Generated motion of 17 joints, 27 frames of it, from 2D to 3D.

    The first stage trains a MixSTE. From its weights three go on, equally long on the same clips:
    untouched, with HoT, and with HoT at equally spaced frames.

    Example:
        >>> task = Poses("tiny")
        >>> task.batch("hot", 0)["poses"].shape
        torch.Size([2, 27, 17, 2])

    Source: HoT, arXiv 2311.12028; the losses are the released code's. Data, sizes, learning rates
    and optimisers are ours; there is no drop-path and no flipping, as no clip comes twice.
    """

    name: ClassVar[str] = "poses"
    autocast = False

    def __init__(self, size: TaskSize = "small", seed: int = 0) -> None:
        super().__init__(size, seed)
        tiny = size == "tiny"
        self.config = MixSTEConfig(frames=FRAMES, hidden=16 if tiny else 64, pairs=4, heads=8)
        first = Stage(3, 2, 3e-3, 1) if tiny else Stage(700, 16, 3e-3, 50, horizon=1400)
        then = Stage(2, 2, 2e-3, 1) if tiny else Stage(450, 16, 2e-3, 20)
        self.stages = {"first": first, "untouched": then, "hot": then, "uniform": then}
        self.methods = {"hot": HoT(layer=LAYER), "uniform": UniformFrames(layer=LAYER)}
        self.clips = 4 if tiny else 1024

    def build(self) -> dict[str, nn.Module]:
        """The untouched model, and those with the trained parts of HoT."""
        with_slots = MixSTEConfig(**{**vars(self.config), "slots": KEPT})
        return {
            "untouched": MixSTE(self.config),
            "hot": MixSTE(with_slots),
            "uniform": MixSTE(with_slots),
        }

    def groups(self, stage: str, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, float]]:
        """One model a stage."""
        return [(modules["untouched" if stage == "first" else stage], 1.0)]

    def begin(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Behind the first stage, give its weights to all."""
        if stage == "untouched":
            weights = modules["untouched"].state_dict()
            for name in self.methods:
                modules[name].load_state_dict(weights, strict=False)

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """Clips, half of them with holds: "poses" [B, F, J, 2] and "joints" [B, F, J, 3]."""
        stream = _FIRST if stage == "first" else _THEN
        return self._clips((stream, step), self.stages[stage].clips, holds=0.5)

    def _clips(self, numbers: tuple[int, ...], clips: int, holds: float) -> dict[str, Tensor]:
        draw = np.random.Generator(np.random.PCG64([self.seed, *numbers]))
        made = make_clips(draw, clips, FRAMES, holds=holds)
        return {"poses": torch.from_numpy(made.poses), "joints": torch.from_numpy(made.joints)}

    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted error of joints, smoothness and error of velocity."""
        if stage in self.methods:
            with foveate.reduce(modules[stage], self.methods[stage], tokens=KEPT):
                found_BFJ3 = modules[stage](batch["poses"])
        else:
            found_BFJ3 = modules["untouched"](batch["poses"])
        loss = pose_loss(found_BFJ3, batch["joints"])
        return loss, {"error_mm": joint_errors(found_BFJ3, batch["joints"]).mean()}

    # -- measurement ------------------------------------------------------------------------------

    def measure(self, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
        """HoT trained and untrained, beside equally spaced frames, with and without holds."""
        runs: dict[str, tuple[nn.Module, HoT | None]] = {
            "untouched": (modules["untouched"], None),
            "hot": (modules["hot"], self.methods["hot"]),
            "uniform": (modules["uniform"], self.methods["uniform"]),
            "hot, untrained": (modules["untouched"], self.methods["hot"]),
            "uniform, untrained": (modules["untouched"], self.methods["uniform"]),
        }
        outcomes: list[Outcome] = []
        done, total = 0, 2 * len(runs)
        for number, (on, holds) in enumerate((("clips with holds", 1.0), ("no holds", 0.0))):
            errors: dict[str, Tensor] = {}
            shares: dict[str, float] = {}
            for name, (model, method) in runs.items():
                errors[name], shares[name] = self._measured(model, method, number, holds)
                done += 1
                tell("evaluation", done, total, {})
            outcomes += judged(on, errors, shares, compares=holds > 0)
        return outcomes

    def _measured(
        self, model: nn.Module, method: HoT | None, number: int, holds: float
    ) -> tuple[Tensor, float]:
        """Error of every held-out clip, [clips] in mm, and the share of the untouched FLOPs."""
        device = next(model.parameters()).device
        share, errors = 1.0, []
        for batch in self._held_out(number, holds):
            poses_BFJ2, joints_BFJ3 = (batch[key].to(device) for key in ("poses", "joints"))
            if method is None:
                errors.append(joint_errors(model(poses_BFJ2), joints_BFJ3))
                continue
            with foveate.reduce(model, method, tokens=KEPT) as run:
                errors.append(joint_errors(model(poses_BFJ2), joints_BFJ3))
            flops = run.report.flops
            share = flops["reduced"]["total"] / flops["untouched"]["total"]
        return torch.cat(errors).cpu(), share

    def _held_out(self, number: int, holds: float) -> Iterator[dict[str, Tensor]]:
        size = min(self.clips, 64)
        for step in range(self.clips // size):
            yield self._clips((_HELD_OUT, number, step), size, holds)


def joint_errors(found_BFJ3: Tensor, true_BFJ3: Tensor) -> Tensor:
    """Mean distance of joints (MPJPE) of every clip in mm, [B]; the root is known.

    Example:
        >>> true = torch.zeros(1, 2, 4, 3)
        >>> joint_errors(true + torch.tensor([0.003, 0.004, 0.0]), true)
        tensor([3.7500])
    """
    error_BFJ = (found_BFJ3.detach().float() - true_BFJ3).norm(dim=-1)
    error_BFJ[..., 0] = 0.0
    return 1000 * error_BFJ.mean(dim=(1, 2))


def judged(
    on: str, errors: dict[str, Tensor], shares: dict[str, float], *, compares: bool
) -> list[Outcome]:
    """The outcomes on one kind of clips; `compares`: HoT is asked to beat equal distances."""
    recipes = {
        "untouched": "untouched",
        "hot": f"hot(layer={LAYER})",
        "uniform": "equally spaced frames, trained alike",
        "hot, untrained": f"hot(layer={LAYER}), no training",
        "uniform, untrained": "equally spaced frames, no training",
    }
    full = errors["untouched"]
    rows = []
    for name, error_C in errors.items():
        value = float(error_C.mean())
        asked = name == "hot"
        rows.append(
            Outcome(
                recipes[name],
                _METRIC,
                value,
                shares[name],
                bar="within 5 % of untouched" if asked else "",
                met=value <= _NEAR * float(full.mean()) if asked else None,
                on=on,
                note="" if name == "untouched" else _versus(error_C, full, "untouched"),
            )
        )
    if compares:
        gain_C = errors["uniform"] - errors["hot"]
        rows.append(
            Outcome(
                recipes["hot"],
                "below equally spaced frames (mm)",
                float(gain_C.mean()),
                shares["hot"],
                bar="better than equally spaced frames, by two standard errors",
                met=bool(gain_C.mean() > 2 * _standard_error(gain_C)),
                on=on,
                note=_versus(errors["hot"], errors["uniform"], "equally spaced frames"),
            )
        )
    return rows


def _versus(error_C: Tensor, other_C: Tensor, name: str) -> str:
    gap_C = error_C - other_C
    part = 100 * float(gap_C.mean() / other_C.mean())
    return (
        f"{part:+.1f} % of {name}: {float(gap_C.mean()):+.2f} mm, standard error "
        f"{_standard_error(gap_C):.2f} mm over {len(gap_C)} clips"
    )


def _standard_error(value_C: Tensor) -> float:
    return float(value_C.std()) / math.sqrt(len(value_C))
