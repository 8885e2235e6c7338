"""A small model that is trained on generated data to show what a method keeps.

A `Task` says what is trained on what, and how the methods are measured on the result;
`TaskTraining` runs it in a folder, resumably, and writes weights and card.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import foveate
from foveate.training.data import batches
from foveate.training.folder import (
    CARD,
    WEIGHTS,
    claim,
    provenance,
    publish,
    stage_facts,
    version_note,
)
from foveate.training.loop import Run, Tell, make_optimisers
from foveate.training.sizes import Stage

TaskSize = Literal["tiny", "small"]


@dataclass(frozen=True)
class Outcome:
    """What one model, with one method at one budget, reaches on held-out data.

    Attributes:
        recipe: the method with its options, or "untouched".
        metric: what is measured, with its unit: "accuracy (%)", "mIoU (%)", "error (mm)".
        value: of the metric.
        flops: fraction of the untouched model's FLOPs; None where nothing was counted.
        bar: what is asked of this line, in words; empty where it is there for comparison.
        met: whether it is; None without a bar.
        on: the held-out data, where a task has several.
        note: what else to know.

    Example:
        >>> Outcome("gtp_vit", "accuracy (%)", 91.25, flops=0.7, bar="within 1 point", met=True)
        ... # doctest: +ELLIPSIS
        Outcome(recipe='gtp_vit', metric='accuracy (%)', value=91.25, flops=0.7, ...)
    """

    recipe: str
    metric: str
    value: float
    flops: float | None = None
    bar: str = ""
    met: bool | None = None
    on: str = ""
    note: str = ""


def standard_error(value_N: Tensor) -> float:
    """Standard error of the mean of N samples.

    Example:
        >>> standard_error(torch.tensor([1.0, 3.0, 1.0, 3.0]))  # doctest: +ELLIPSIS
        0.577...
    """
    return float(value_N.std()) / len(value_N) ** 0.5


def paired_gain(value_N: Tensor, other_N: Tensor) -> tuple[float, float]:
    """How far N samples lie above others of the same things: the mean, and its standard error.

    Example:
        >>> paired_gain(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0]))
        (3.0, 1.0)
    """
    gain_N = value_N.double() - other_N.double()
    return float(gain_N.mean()), standard_error(gain_N)


def numbers_of(*seed: int) -> np.random.Generator:
    """A stream of random numbers that is the same wherever it is asked for by these numbers.

    Example:
        >>> bool(numbers_of(0, 1).random() == numbers_of(0, 1).random())
        True
    """
    return np.random.Generator(np.random.PCG64(list(seed)))


class Task(ABC):
    """Data, model, loss and measurement of one training.

    A batch depends on the names and numbers that `batch` is given alone, never on a global random
    state, so that a training that was killed goes on to the same weights. `build` may use torch's
    global generator: it is seeded.

    Args:
        size: "tiny" (seconds, learns nothing much: for tests) or "small" (minutes of two CPU
            cores).
        seed: of weights and data.

    Attributes:
        name: as on the command line.
        stages: in order; a checkpoint is written for each.
        autocast: train under bfloat16 autocast.
    """

    name: ClassVar[str]
    stages: Mapping[str, Stage]
    autocast: bool = True

    def __init__(self, size: TaskSize = "small", seed: int = 0) -> None:
        if size not in ("tiny", "small"):
            raise ValueError(f"unknown size {size!r}; choose tiny or small.")
        self.size: TaskSize = size
        self.seed = seed

    @abstractmethod
    def build(self) -> dict[str, nn.Module]:
        """The modules by name, untrained; all of them are saved."""

    def groups(self, stage: str, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, float]]:
        """What a stage trains, with the factor on the learning rate of each; the rest is frozen."""
        return [(module, 1.0) for module in modules.values()]

    def begin(self, stage: str, modules: dict[str, nn.Module]) -> None:  # noqa: B027
        """Called before the first step of a stage, not where it is gone on with.

        Weights may be copied here from one module to another.
        """

    @abstractmethod
    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """The data of one step."""

    @abstractmethod
    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and facts that are reported with it."""

    def after_step(self, stage: str, modules: dict[str, nn.Module]) -> None:  # noqa: B027
        """Called behind every step of the optimisers, for moving averages."""

    @abstractmethod
    def measure(self, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
        """The untouched model and the methods, on held-out data; modules are in eval mode.

        Args:
            modules: trained.
            tell: called as ``tell("evaluation", done, total, {})``.
        """


class _Steps(Dataset):
    """Step -> batch of a stage."""

    def __init__(self, task: Task, stage: str) -> None:
        self.task, self.stage = task, stage

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.task.batch(self.stage, step)


@dataclass
class TaskTraining:
    """Training of one task in one folder.

    A training that is killed goes on from its last checkpoint with `resume`, to the same weights on
    the same machine.

    Attributes:
        task: what.
        folder: where checkpoints, `model.safetensors` and `card.json` go.
        device: "cpu", "cuda", "cuda:1".
        workers: processes that make batches; 0: made in this one.
        resume: go on in a folder that was begun.
        every: steps between checkpoints.

    Example:
        >>> from foveate.training import make_task
        >>> card = TaskTraining(make_task("poses", "tiny"), Path("poses")).run()
        >>> card["outcomes"][0]["recipe"]
        'untouched'
    """

    task: Task
    folder: Path
    device: str = "cpu"
    workers: int = 0
    resume: bool = False
    every: int = 200

    def run(self, tell: Tell = lambda *_: None) -> dict[str, Any]:
        """Train what is left, measure, write weights and card; returns the card.

        Raises:
            FileExistsError: the folder holds something else; see `foveate.training.folder.claim`.
            ValueError: the folder was begun with other settings.
            TrainingError: the loss or a gradient is not finite.
        """
        task = self.task
        claim(self.folder, self._settings(), resume=self.resume)
        modules = _built(task, self.device)
        for module in modules.values():
            module.train()
        runs = []
        for name in task.stages:
            run = self._prepare(name, modules)
            if not run.file.exists():
                task.begin(name, modules)
            run.train(partial(self._batches, name), tell)
            runs.append(run)
        card = self._card(modules, runs, tell)
        publish(self.folder, partial(_save, modules), card)
        return card

    def version_note(self) -> str | None:
        """As `foveate.training.folder.version_note`."""
        return version_note(self.folder)

    def _settings(self) -> dict[str, Any]:
        stages = {name: asdict(stage) for name, stage in self.task.stages.items()}
        task = self.task
        return {"task": task.name, "size": task.size, "seed": task.seed, "stages": stages}

    def _batches(self, stage: str, steps: range) -> Iterable[dict[str, Any]]:
        pinned = torch.device(self.device).type == "cuda"
        return batches(_Steps(self.task, stage), steps, self.workers, pinned=pinned)

    def _prepare(self, name: str, modules: dict[str, nn.Module]) -> Run:
        for module in modules.values():
            module.requires_grad_(False)
        groups = self.task.groups(name, modules)
        for module, _ in groups:
            module.requires_grad_(True)
        stage = self.task.stages[name]
        kind = torch.device(self.device).type

        def loss(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            made = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            with torch.autocast(kind, torch.bfloat16, enabled=self.task.autocast):
                return self.task.loss(name, modules, made)

        return Run(
            name,
            stage,
            modules,
            make_optimisers(groups, stage.rate),
            loss,
            self.folder,
            self.every,
            after=lambda: self.task.after_step(name, modules),
        )

    def _card(
        self, modules: dict[str, nn.Module], runs: Iterable[Run], tell: Tell
    ) -> dict[str, Any]:
        began = time.perf_counter()
        outcomes = _measured(self.task, modules, tell)
        return {
            "foveate": foveate.__version__,
            **{key: value for key, value in self._settings().items() if key != "stages"},
            "parameters": {
                name: sum(p.numel() for p in module.parameters())
                for name, module in modules.items()
            },
            **provenance(self.device),
            "stages": stage_facts(runs, "samples"),
            "outcomes": [asdict(outcome) for outcome in outcomes],
            "evaluation_seconds": round(time.perf_counter() - began, 1),
        }


def load_task(folder: str | Path, *, device: str = "cpu") -> tuple[Task, dict[str, nn.Module]]:
    """A task and its trained modules, in eval mode.

    Args:
        folder: of a finished training.
        device: where the weights go.

    Raises:
        FileNotFoundError: the folder holds no finished task.
    """
    from foveate.training.registry import make_task

    folder = Path(folder)
    if not (folder / WEIGHTS).exists() or not (folder / CARD).exists():
        raise FileNotFoundError(
            f"{folder} holds no finished training ({WEIGHTS} and {CARD}); train one with "
            "`foveate train NAME --out FOLDER`."
        )
    card = json.loads((folder / CARD).read_text())
    if "task" not in card:
        raise FileNotFoundError(
            f"{folder} holds a model that is no task's; load it with "
            "foveate.checkpoints.load_model(folder)."
        )
    task = make_task(card["task"], card["size"], card["seed"])
    modules = _built(task, device)
    tensors = load_file(folder / WEIGHTS, device=device)
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict(
            {key[len(prefix) :]: x for key, x in tensors.items() if key.startswith(prefix)}
        )
        module.eval()
    return task, modules


def measure_again(
    folder: str | Path, tell: Tell = lambda *_: None, *, device: str = "cpu"
) -> dict[str, Any]:
    """Measure a finished training once more and renew the outcomes on its card; returns the card.

    Raises:
        FileNotFoundError: the folder holds no finished task.
    """
    task, modules = load_task(folder, device=device)
    began = time.perf_counter()
    outcomes = _measured(task, modules, tell)
    file = Path(folder) / CARD
    card = json.loads(file.read_text())
    card["outcomes"] = [asdict(outcome) for outcome in outcomes]
    card["evaluation_seconds"] = round(time.perf_counter() - began, 1)
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(card, indent=1) + "\n")
    draft.replace(file)
    return card


def _built(task: Task, device: str) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        return {name: module.to(device) for name, module in task.build().items()}


def _measured(task: Task, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
    for module in modules.values():
        module.eval()
        module.requires_grad_(False)
    with torch.inference_mode():
        return task.measure(modules, tell)


def _save(modules: dict[str, nn.Module], folder: Path) -> None:
    folder.mkdir(parents=True)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
