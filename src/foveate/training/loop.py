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

from foveate.errors import TrainingError
from foveate.training.sizes import Stage

#: Called with the name of the stage, steps done, steps of the stage and means since the last call.
Tell = Callable[[str, int, int, dict[str, float]], None]
#: Learning rate of the last step, as a fraction of the peak.
_END_RATE = 0.05
#: Largest norm of the gradient.
_CLIP = 1.0


def rate_at(stage: Stage, step: int) -> float:
    """Learning rate of a step as a fraction of the peak: linear warm-up, then a cosine.

    Example:
        >>> rate_at(Stage(100, 1, 1e-3, warmup=10), 9)
        1.0
    """
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    length = (stage.horizon or stage.steps) - stage.warmup
    part = (step - stage.warmup) / max(length, 1)
    return _END_RATE + (1 - _END_RATE) * (1 + math.cos(math.pi * part)) / 2


def make_optimisers(
    groups: Iterable[tuple[nn.Module, float]], rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks, AdamW for everything else.

    Only parameters that require a gradient are taken; embeddings are tables and count as the rest.

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
        report_every: steps between reports.
        after: called behind every step of the optimisers.
        seconds: spent in the steps so far, over all runs that were needed.
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
    after: Callable[[], None] | None = None
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        """The stage's checkpoint."""
        return self.folder / f"{self.name}.pt"

    def train(self, batches: Callable[[range], Iterable[dict[str, Any]]], tell: Tell) -> None:
        """Run what is left of the stage.

        Args:
            batches: the batches of a range of steps, in order.
            tell: called with no facts where the stage goes on, and with facts from there on.

        Raises:
            TrainingError: the loss or a gradient is not finite; the checkpoint is older and sound.
        """
        steps = range(self.load(), self.stage.steps)
        tell(self.name, steps.start, steps.stop, {})
        if not steps:
            return
        parameters = [
            p for o in self.optimisers for group in o.param_groups for p in group["params"]
        ]
        begin = time.perf_counter() - self.seconds
        sums: dict[str, Tensor] = {}
        norms: Any = 0.0
        since = 0
        for step, batch in zip(steps, batches(steps), strict=False):
            self._set_rate(rate_at(self.stage, step))
            loss, facts = self.loss(batch)
            loss.backward()
            norms = norms + nn.utils.clip_grad_norm_(parameters, _CLIP).detach()
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            if self.after is not None:
                self.after()
            for name, value in {"loss": loss, **facts}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            since += 1
            done = step + 1
            saves = done % self.every == 0 or done == self.stage.steps
            # Reported wherever it is saved: a resumed run averages over the same steps.
            if saves or done % self.report_every == 0:
                means = {name: float(value) / since for name, value in sums.items()}
                self._refuse_broken(done, means["loss"], float(norms))
                self.seconds = time.perf_counter() - begin
                self.history.append({"step": done, **means, "seconds": self.seconds})
                tell(self.name, done, self.stage.steps, means)
                sums, norms, since = {}, 0.0, 0
            if saves:
                self.save(done)

    def _refuse_broken(self, done: int, loss: float, norms: float) -> None:
        for what, value in (("loss", loss), ("gradient", norms)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {what} of stage {self.name!r} is {value} by step {done}, which resuming "
                    f"would only repeat: train in a new folder, with a peak rate of this stage "
                    f"below {self.stage.rate} or another seed."
                )

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
        """Read the checkpoint, if there is one; returns the number of the next step."""
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
