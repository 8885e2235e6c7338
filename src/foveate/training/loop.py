"""A training loop that can be killed at any moment and goes on exactly where it was.

The data of a step depend on its number alone and nothing else is random, so a checkpoint is the
weights, the state of the optimisers and the number of the next step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.training.sizes import Stage

#: Called with the name of the stage, the step, the number of steps and facts about the step.
Tell = Callable[[str, int, int, dict[str, float]], None]
_END_RATE = 0.05
_CLIP = 1.0


def rate_at(stage: Stage, step: int) -> float:
    """Learning rate of a step as a fraction of the peak: linear warm-up, then a cosine.

    Example:
        >>> rate_at(Stage(100, 1, 1e-3, warmup=10), 9)
        1.0
    """
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    part = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    return _END_RATE + (1 - _END_RATE) * (1 + math.cos(math.pi * part)) / 2


def make_optimisers(
    groups: Iterable[tuple[nn.Module, float]], rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks, AdamW for everything else.

    Args:
        groups: modules and the factor on the learning rate of each.
        rate: peak learning rate of AdamW; Muon's updates are scaled to the same size.

    Source: Muon, K. Jordan et al. 2024; scaling of updates: arXiv 2502.16982, section 2.2.
    """
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for module, factor in groups:
        inside = [p for p in module.parameters() if p.requires_grad and p.ndim == 2]
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        flat = [p for p in inside if id(p) not in tables]
        chosen = {id(p) for p in flat}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
        if flat:
            matrices.append({"params": flat, "lr": rate * factor, "peak": rate * factor})
        if rest:
            others.append({"params": rest, "lr": rate * factor, "peak": rate * factor})
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        made.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0))
    return made


@dataclass
class Run:
    """One stage's training.

    Attributes:
        name: of the stage.
        stage: its length and rates.
        modules: whose parameters are saved, by name.
        optimisers: from `make_optimisers`.
        loss: batch -> (loss, facts).
        folder: of checkpoints.
        every: steps between checkpoints.
        history: facts of past steps, one dictionary per report.
    """

    name: str
    stage: Stage
    modules: dict[str, nn.Module]
    optimisers: list[torch.optim.Optimizer]
    loss: Callable[[dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]
    folder: Path
    every: int = 200
    report_every: int = 20
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        """The stage's checkpoint."""
        return self.folder / f"{self.name}.pt"

    def train(self, batches: Callable[[range], Iterable[dict[str, Any]]], tell: Tell) -> None:
        """Run what is left of the stage."""
        first = self.load()
        parameters = [
            p for o in self.optimisers for group in o.param_groups for p in group["params"]
        ]
        begin, spent = time.perf_counter(), self.seconds
        sums: dict[str, Tensor] = {}
        since = 0
        for step, batch in zip(
            range(first, self.stage.steps), batches(range(first, self.stage.steps)), strict=False
        ):
            self._set_rate(rate_at(self.stage, step))
            loss, facts = self.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, _CLIP)
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            for name, value in {"loss": loss, **facts}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            since += 1
            done = step + 1
            if done % self.report_every == 0 or done == self.stage.steps:
                means = {name: float(value) / since for name, value in sums.items()}
                if not math.isfinite(means["loss"]):
                    raise FloatingPointError(
                        f"the loss of stage {self.name!r} is {means['loss']} at step {done}; the "
                        "last checkpoint is sound: lower the rate and resume."
                    )
                self.seconds = spent + time.perf_counter() - begin
                self.history.append({"step": done, **means, "seconds": self.seconds})
                tell(self.name, done, self.stage.steps, means)
                sums, since = {}, 0
            if done % self.every == 0 or done == self.stage.steps:
                self.seconds = spent + time.perf_counter() - begin
                self.save(done)

    def _set_rate(self, part: float) -> None:
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * part

    def save(self, step: int) -> None:
        """Write a checkpoint; a crash while writing leaves the last one whole."""
        state = {
            "step": step,
            "seconds": self.seconds,
            "history": json.dumps(self.history),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        draft = self.file.with_suffix(".tmp")
        torch.save(state, draft)
        os.replace(draft, self.file)  # noqa: PTH105

    def load(self) -> int:
        """Read the checkpoint, if there is one; returns the next step."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.seconds = state["seconds"]
        self.history = json.loads(state["history"])
        return state["step"]
