"""A Vision Mamba that tells shapes apart, and ToP-ViM on it.

Legend: B pictures, K tokens that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import foveate
from foveate.core import EncoderContext, Reduction, Tokens, backbone_context
from foveate.methods.tovim import ToPViM
from foveate.models.backbones import VisionMamba, VisionMambaConfig
from foveate.training.loop import Tell
from foveate.training.sizes import Stage
from foveate.training.task import Outcome, Task, TaskSize, standard_error
from foveate.training.tasks.scan_data import SHAPES, draw_pictures

#: Patches that leave the last block, as a fraction, in fine-tuning and in the measurement.
RETAIN = 0.7
#: A second, smaller budget that nothing was trained for.
_FEWER = 0.5
#: Streams of random numbers: the first stage, those behind it, and held-out pictures.
_FIRST, _THEN, _HELD_OUT = range(3)
#: What is asked of the fine-tuned model, in points below the untouched one.
_NEAR = 1.5
_METRIC = "accuracy (%)"


class Scan(Task):
    """Procedural shapes on cluttered grounds, told apart by a bidirectional Vision Mamba.

    The first stage trains on all patches; from its weights the second one goes on with ToP-ViM, a
    fifth as long.

    Example:
        >>> task = Scan("tiny")
        >>> task.batch("pruned", 0)["pixels"].shape
        torch.Size([4, 3, 32, 32])

    Source: ToP-ViM, arXiv 2409.18962; pictures, model and training are ours.
    """

    name: ClassVar[str] = "scan"
    # A scan is in float32; casting back and forth around it costs more than it saves.
    autocast = False

    def __init__(self, size: TaskSize = "small", seed: int = 0) -> None:
        super().__init__(size, seed)
        tiny = size == "tiny"
        self.config = VisionMambaConfig(
            image_size=32 if tiny else 64,
            patch_size=8,
            depth=3 if tiny else 4,
            hidden=16 if tiny else 32,
            state=4,
            classes=len(SHAPES),
        )
        first = Stage(6, 4, 2e-3, 2) if tiny else Stage(1400, 16, 8e-3, 50)
        then = Stage(3, 4, 2e-4, 1) if tiny else Stage(260, 16, 2e-3, 20)
        self.stages = {"dense": first, "pruned": then}
        self.held_out = 16 if tiny else 1024

    def build(self) -> dict[str, nn.Module]:
        """The model and the one that goes on from it."""
        return {name: VisionMamba(self.config) for name in self.stages}

    def groups(self, stage: str, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, float]]:
        """Each stage trains the model that is called like it."""
        return [(modules[stage], 1.0)]

    def begin(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Go on from the weights of the first stage."""
        if stage != "dense":
            modules[stage].load_state_dict(modules["dense"].state_dict())

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """Pictures uint8 [B, 3, h, w] and their shapes [B]."""
        stream = _FIRST if stage == "dense" else _THEN
        return self._pictures(stream, step, self.stages[stage].clips)

    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the shape."""
        model = modules[stage]
        pruned = stage == "pruned"
        with foveate.reduce(model, ToPViM(), retain=RETAIN) if pruned else nullcontext():
            logits_BC = model(as_input(batch["pixels"])).logits
        right = (logits_BC.argmax(-1) == batch["label"]).float().mean()
        return cross_entropy(logits_BC, batch["label"]), {"accuracy": right}

    def measure(self, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
        """All patches; pruned untrained (aligned, naive, at random); pruned and trained."""
        aligned, naive, drawn = ToPViM(), ToPViM(align=False), RandomPatches()
        runs: dict[str, tuple[str, ToPViM | None, float]] = {
            "untouched": ("dense", None, 1.0),
            "aligned": ("dense", aligned, RETAIN),
            "naive": ("dense", naive, RETAIN),
            "random": ("dense", drawn, RETAIN),
            "aligned, fewer": ("dense", aligned, _FEWER),
            "naive, fewer": ("dense", naive, _FEWER),
            "random, fewer": ("dense", drawn, _FEWER),
            "tuned aligned": ("pruned", aligned, RETAIN),
        }
        found: dict[str, Tensor] = {}
        shares: dict[str, float] = {}
        for number, (name, (model, method, retain)) in enumerate(runs.items()):
            tell("evaluation", number, len(runs), {})
            found[name], shares[name] = self._measured(modules[model], method, retain)
        tell("evaluation", len(runs), len(runs), {})
        return outcome_rows(found, shares)

    def _measured(
        self, model: nn.Module, method: ToPViM | None, retain: float
    ) -> tuple[Tensor, float]:
        """100 for every held-out picture that is named right, else 0; share of the FLOPs."""
        device = next(model.parameters()).device
        share, right = 1.0, []
        for batch in self._held_out():
            pixels, label_B = as_input(batch["pixels"].to(device)), batch["label"]
            if method is None:
                logits_BC = model(pixels).logits
            else:
                with foveate.reduce(model, method, retain=retain) as run:
                    logits_BC = model(pixels).logits
                flops = run.report.flops
                share = flops["reduced"]["total"] / flops["untouched"]["total"]
            right.append(100.0 * (logits_BC.argmax(-1).cpu() == label_B))
        return torch.cat(right), share

    def _held_out(self) -> Iterator[dict[str, Tensor]]:
        # Small batches: the states of a scan then fit into the caches of a core.
        size = min(self.held_out, 16)
        for step in range(self.held_out // size):
            yield self._pictures(_HELD_OUT, step, size)

    def _pictures(self, stream: int, step: int, count: int) -> dict[str, Tensor]:
        draw = np.random.Generator(np.random.PCG64([self.seed, stream, step]))
        pixels, label = draw_pictures(draw, count, self.config.image_size)
        return {"pixels": torch.from_numpy(pixels), "label": torch.from_numpy(label)}


@dataclass(frozen=True)
class RandomPatches(ToPViM):
    """ToP-ViM that drops patches at random: what it is compared with."""

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Choose the patches; tokens [B, K, C]."""
        context = backbone_context(self, context)
        B, K, _ = tokens.x_BND.shape
        # Drawn for a batch of any size alike, on the CPU, so that no device draws otherwise.
        draw = torch.Generator().manual_seed(context.seed * 1000 + context.layer)
        y_PBKE = torch.rand(1, B, K, 1, generator=draw).to(tokens.x_BND.device)
        return super().encoder(
            tokens, replace(context, read={**context.read, "scan_outputs": lambda: y_PBKE})
        )


def as_input(pixels_B3HW: Tensor) -> Tensor:
    """Pictures uint8 to float in -1 .. 1."""
    return pixels_B3HW.float() / 127.5 - 1


def outcome_rows(found: dict[str, Tensor], shares: dict[str, float]) -> list[Outcome]:
    """The outcomes with their bars, from 100 or 0 per picture and shares of the FLOPs."""
    recipes = {
        "untouched": "untouched",
        "aligned": f"tovim(retain={RETAIN}), no training",
        "naive": f"tovim(align=False, retain={RETAIN}), no training",
        "random": f"random patches, {RETAIN} kept, no training",
        "aligned, fewer": f"tovim(retain={_FEWER}), no training",
        "naive, fewer": f"tovim(align=False, retain={_FEWER}), no training",
        "random, fewer": f"random patches, {_FEWER} kept, no training",
        "tuned aligned": f"tovim(retain={RETAIN}), fine-tuned",
    }
    whole_N, rows = found["untouched"], []
    for name, right_N in found.items():
        other, bar, met = "untouched", "", None
        if name.startswith("aligned"):
            other = name.replace("aligned", "naive")
            gain, error = _gain(right_N, found[other])
            bar, met = "above naive (align=False), by two standard errors", gain > 2 * error
        elif name == "tuned aligned":
            bar = f"within {_NEAR} points of untouched"
            met = _gain(right_N, whole_N)[0] >= -_NEAR
        note = "" if name == "untouched" else _versus(right_N, found[other], other.split(",")[0])
        value = float(right_N.mean())
        rows.append(Outcome(recipes[name], _METRIC, value, shares[name], bar, met, note=note))
    return rows


def _gain(right_N: Tensor, other_N: Tensor) -> tuple[float, float]:
    """Mean of the paired differences and its standard error."""
    gain_N = right_N.double() - other_N.double()
    return float(gain_N.mean()), standard_error(gain_N)


def _versus(right_N: Tensor, other_N: Tensor, name: str) -> str:
    gain, error = _gain(right_N, other_N)
    return f"{gain:+.2f} points against {name}, standard error {error:.2f}"
