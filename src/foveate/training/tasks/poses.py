"""A MixSTE that lifts poses to 3D, and HoT on it.

Legend: B clips, F frames, K frames kept, J joints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import foveate
from foveate import ops
from foveate._wording import plural
from foveate.core import EncoderContext, Reduction, Tokens
from foveate.methods.hot import HoT, pose_loss
from foveate.models.backbones import MixSTE, MixSTEConfig
from foveate.training.loop import Tell
from foveate.training.sizes import Stage
from foveate.training.task import Outcome, Task, TaskSize, numbers_of, paired_gain
from foveate.training.tasks.poses_data import Clips, make_clips

#: Frames of a clip, frames kept, and the pair of blocks in front of which the others leave.
FRAMES, KEPT, LAYER = 27, 9, 1
#: Streams of random numbers: training of the first stage, of those behind it, and held-out clips.
_FIRST, _THEN, _HELD_OUT = range(3)
#: What is asked of HoT's error, over the untouched model's.
_NEAR = 1.05
#: How rows are called, and what is said of them.
_RECIPES = {
    "untouched": ("untouched", ""),
    "hot": (f"hot(layer={LAYER})", "trained"),
    "uniform": ("equally spaced frames", "trained alike"),
    "hot, untrained": (f'hot(layer={LAYER}, recovery="interpolate")', "on the untouched weights"),
    "uniform, untrained": ("equally spaced frames, interpolated", "on the untouched weights"),
}


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
        first = Stage(3, 2, 6e-3, 1) if tiny else Stage(1200, 8, 6e-3, 20, horizon=1800)
        then = Stage(2, 2, 3e-3, 1) if tiny else Stage(1000, 8, 3e-3, 10)
        self.stages = {"first": first, "untouched": then, "hot": then, "uniform": then}
        self.methods = {"hot": HoT(layer=LAYER), "uniform": UniformFrames(layer=LAYER)}
        self.clips = 4 if tiny else 2048

    def build(self) -> dict[str, nn.Module]:
        """The untouched model, and those with the trained parts of HoT."""
        with_slots = MixSTEConfig(**{**vars(self.config), "slots": KEPT})
        models = {"untouched": MixSTE(self.config)}
        models |= {name: MixSTE(with_slots) for name in self.methods}
        for model in models.values():
            _begin_with_time(model)
        return dict(models)

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
        made = self._made((stream, step), self.stages[stage].clips, holds=0.5)
        return {"poses": torch.from_numpy(made.poses), "joints": torch.from_numpy(made.joints)}

    def _made(self, numbers: tuple[int, ...], clips: int, holds: float) -> Clips:
        return make_clips(numbers_of(self.seed, *numbers), clips, FRAMES, holds=holds)

    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted error of joints, smoothness and error of velocity."""
        model = modules["untouched" if stage == "first" else stage]
        found_BFJ3 = self._lifted(stage, model, batch["poses"])
        facts = {"error_mm": joint_errors(found_BFJ3, batch["joints"]).mean()}
        return pose_loss(found_BFJ3, batch["joints"]), facts

    def _lifted(self, name: str, model: nn.Module, poses_BFJ2: Tensor) -> Tensor:
        """What a model makes of poses, by itself or with a method: [B, F, J, 3]."""
        if name not in self.methods:
            return model(poses_BFJ2)
        with foveate.reduce(model, self.methods[name], tokens=KEPT):
            return model(poses_BFJ2)

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
            found: dict[str, Measured] = {}
            for name, (model, method) in runs.items():
                found[name] = self._measured(model, method, number, holds)
                done += 1
                tell("evaluation", done, total, {})
            outcomes += judged(on, found, compares=holds > 0)
        return outcomes

    def _measured(
        self, model: nn.Module, method: HoT | None, number: int, holds: float
    ) -> Measured:
        device = next(model.parameters()).device
        share, errors, kept, held = 1.0, [], [], []
        for clips in self._held_out(number, holds):
            poses_BFJ2 = torch.from_numpy(clips.poses).to(device)
            joints_BFJ3 = torch.from_numpy(clips.joints).to(device)
            if method is None:
                errors.append(joint_errors(model(poses_BFJ2), joints_BFJ3))
                continue
            with foveate.reduce(model, method, tokens=KEPT) as run:
                errors.append(joint_errors(model(poses_BFJ2), joints_BFJ3))
            flops, reduction = run.report.flops, run.encoder_reduction
            share = flops["reduced"]["total"] / flops["untouched"]["total"]
            assert reduction is not None
            kept.append(reduction.anchor_BM.cpu())
            held.append(torch.from_numpy(clips.still).gather(1, kept[-1]))
        choice = ""
        if kept:
            sets = len(torch.unique(torch.cat(kept), dim=0))
            choice = (
                f"{100 * float(torch.cat(held).float().mean()):.0f} % of kept frames in holds, "
            )
            choice += f"{plural(sets, 'set')} of frames in all clips"
        return Measured(torch.cat(errors).cpu(), share, choice)

    def _held_out(self, number: int, holds: float) -> Iterator[Clips]:
        size = min(self.clips, 64)
        for step in range(self.clips // size):
            yield self._made((_HELD_OUT, number, step), size, holds)


@dataclass(frozen=True, eq=False)
class Measured:
    """Held-out clips with one method.

    Attributes:
        error_C: of every clip, in mm.
        share: of the untouched model's FLOPs.
        choice: which frames were kept, in words.
    """

    error_C: Tensor
    share: float
    choice: str = ""


@torch.no_grad()
def _begin_with_time(model: MixSTE) -> None:
    """Let frames know their time, and the recovering attention look where the time is the same.

    Both are zeros in the released code, where queries that are all alike meet keys without a time:
    a training as short as this one does not get away from there, and gives every frame the same
    pose. The code of the time counts in the distances that frames are chosen by, too.
    """
    frames, width = model.Temporal_pos_embed.shape[1:]
    rate_W = frames ** (-torch.arange(width // 2) / (width // 2))
    angle_FW = torch.arange(frames)[:, None] * rate_W
    code_FC = 0.5 * torch.cat([angle_FW.sin(), angle_FW.cos()], dim=1)
    model.Temporal_pos_embed.copy_(code_FC)
    if model.config.slots:
        look = model.cross_attention
        model.x_token.copy_(code_FC)
        nn.init.orthogonal_(look.linear_q.weight, gain=3.0)
        look.linear_k.weight.copy_(look.linear_q.weight)
        nn.init.eye_(look.linear_v.weight)
        nn.init.eye_(look.proj.weight)
        for linear in (look.linear_q, look.linear_k, look.linear_v, look.proj):
            nn.init.zeros_(linear.bias)


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


def judged(on: str, found: dict[str, Measured], *, compares: bool) -> list[Outcome]:
    """The outcomes on one kind of clips; `compares`: HoT is asked to beat equal distances.

    Trained with each choice of frames, and on one model that was trained with neither.
    """
    full_C = found["untouched"].error_C
    rows = []
    for name, one in found.items():
        recipe, remark = _RECIPES[name]
        value, asked = float(one.error_C.mean()), name == "hot"
        remarks = (remark, remark and _versus(one.error_C, full_C), one.choice)
        rows.append(
            Outcome(
                recipe,
                "error (mm)",
                value,
                one.share,
                bar="within 5 % of untouched" if asked else "",
                met=value <= _NEAR * float(full_C.mean()) if asked else None,
                on=on,
                note="; ".join(filter(None, remarks)),
            )
        )
    for name in ("hot", "hot, untrained") if compares else ():
        one, other_C = found[name], found[name.replace("hot", "uniform")].error_C
        gain, error = paired_gain(other_C, one.error_C)
        rows.append(
            Outcome(
                _RECIPES[name][0],
                "below equally spaced frames (mm)",
                gain,
                one.share,
                bar="better by two standard errors",
                met=gain > 2 * error,
                on=on,
                note=f"error beside theirs: {_versus(one.error_C, other_C)}",
            )
        )
    return rows


def _versus(error_C: Tensor, other_C: Tensor) -> str:
    gap, error = paired_gain(error_C, other_C)
    part = 100 * gap / float(other_C.mean())
    return f"{part:+.1f} %, standard error {error:.2f} mm of {len(error_C)} clips"
