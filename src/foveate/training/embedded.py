"""`foveate train embedded`: the video LLM that ships with the package, from nothing to weights.

Three stages: the tower on labels of patches; the language model on questions and captions, the
tower frozen; everything together.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.training.data import AnswerBatches, TowerBatches, batches
from foveate.training.dense import DenseHeads
from foveate.training.evaluate import VIEWS, summary, world_accuracy
from foveate.training.loop import Run, Tell, make_optimisers
from foveate.training.model import build_model, normalise, save_pretrained
from foveate.training.packing import packed_hidden, visual_tokens
from foveate.training.sizes import Size

#: Clips of different stages never meet.
_FIRST_CLIP = {"tower": 0, "answers": 10_000_000, "joint": 20_000_000}
_STATE = "training.json"


@dataclass
class EmbeddedTraining:
    """Training of one size, in one folder.

    Attributes:
        size: which.
        folder: where checkpoints and the finished model go.
        device: where to train.
        seed: of weights and clips.
        workers: processes that make clips.
        clips: held-out clips of the final evaluation.
        resume: go on in a folder that has been trained in.
    """

    size: Size
    folder: Path
    device: str = "cpu"
    seed: int = 0
    workers: int = 1
    clips: int = 1024
    resume: bool = False

    def run(self, tell: Tell = lambda *_: None) -> dict[str, Any]:
        """Train what is left, evaluate, write the model and its card; returns the card.

        Raises:
            FileExistsError: the folder holds a finished model, or a training and `resume` is off.
            ValueError: `resume` with other settings than those the folder was begun with.
        """
        self._claim()
        model: Any = build_model(self.size, self.seed)
        model.to(self.device)
        if torch.device(self.device).type == "cpu":
            # Fused attention is slow on CPU in the backward pass of many short sequences.
            model.set_attn_implementation({"vision_config": "eager"})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            heads = DenseHeads(self.size.vision[0], self.size.text[0]).to(self.device)
        model.train()
        runs = []
        for name in ("tower", "answers", "joint"):
            run = self._prepare(name, model, heads)
            first = _FIRST_CLIP[name]
            data = (
                TowerBatches(self.size, self.seed, first)
                if name == "tower"
                else AnswerBatches(self.size, self.seed, run.stage.clips, first)
            )
            run.train(lambda steps, data=data: batches(data, steps, self.workers), tell)
            runs.append(run)
        # What is evaluated is what is stored: weights rounded to the stored type.
        model.to(getattr(torch, self.size.dtype)).float()
        card = self._card(model, runs)
        save_pretrained(model.to(getattr(torch, self.size.dtype)), self.size, self.folder)
        (self.folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
        return card

    def _claim(self) -> None:
        """Take the folder, or refuse it."""
        file = self.folder / _STATE
        if (self.folder / "model.safetensors").exists():
            raise FileExistsError(
                f"{self.folder} holds a finished model; name another folder or move it away."
            )
        settings = {"size": self.size.as_dict(), "seed": self.seed}
        settings = json.loads(json.dumps(settings))
        if file.exists():
            if not self.resume:
                raise FileExistsError(
                    f"{self.folder} holds a training that was begun; go on with --resume, or name "
                    "another folder."
                )
            begun = json.loads(file.read_text())
            if begun != settings:
                raise ValueError(
                    f"{self.folder} was begun with other settings than these: {begun} is not "
                    f"{settings}."
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} is not empty; name a new folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1) + "\n")

    # -- stages ---------------------------------------------------------------------------------

    def _prepare(self, name: str, model: Any, heads: DenseHeads) -> Run:
        inner = model.model
        stage = getattr(self.size, name)
        model.requires_grad_(True)
        groups: list[tuple[nn.Module, float]]
        if name == "tower":
            groups = [(inner.vision_tower, 1.0), (inner.multi_modal_projector, 1.0), (heads, 1.0)]
        else:
            groups = [(inner.language_model, 1.0), (inner.multi_modal_projector, 0.5)]
            if name == "joint":
                groups.append((inner.vision_tower, 0.3))
            else:
                inner.vision_tower.requires_grad_(False)
        optimisers = make_optimisers(groups, stage.rate)
        if name != "tower":
            newline = {"params": [inner.image_newline], "lr": stage.rate, "peak": stage.rate}
            optimisers[-1].add_param_group(newline)

        def loss(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                if name == "tower":
                    return heads.loss(model, self._frames_on_device(batch))
                return answer_loss(model, self._on_device(batch), frozen=name == "answers")

        modules = {"model": model, "heads": heads}
        return Run(name, stage, modules, optimisers, loss, self.folder)

    def _on_device(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return {name: self._on_device(value) for name, value in batch.items()}
        return batch.to(self.device, non_blocking=True)

    def _frames_on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = self._on_device(batch)
        return {**batch, "pixels": normalise(batch["frames"])}

    # -- result ---------------------------------------------------------------------------------

    def _card(self, model: Any, runs: Iterable[Run]) -> dict[str, Any]:
        began = time.perf_counter()
        accuracy = {
            view: summary(
                world_accuracy(
                    model, self.size, seed=self.seed, split="test", clips=self.clips, view=view
                )
            )
            for view in VIEWS
        }
        runs = list(runs)
        return {
            "size": self.size.as_dict(),
            "seed": self.seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "visual_tokens": self.size.visual_tokens,
            "hardware": hardware(self.device),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "stages": {
                run.name: {
                    "steps": run.stage.steps,
                    "clips": run.stage.steps * run.stage.clips,
                    "seconds": round(run.seconds, 1),
                    "curve": _thinned(run.history),
                }
                for run in runs
            },
            "test": {"split": "test", "clips": self.clips, "accuracy": accuracy},
            "evaluation_seconds": round(time.perf_counter() - began, 1),
        }


def answer_loss(
    model: Any, batch: dict[str, Tensor], *, frozen: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted cross entropy of answers and captions, and the fraction of answers that is right.

    Args:
        model: a `LlavaOnevisionForConditionalGeneration`.
        batch: of `AnswerBatches`.
        frozen: whether the tower is left out of the gradient.
    """
    visual_BVD = visual_tokens(model, batch["frames"], frozen=frozen)
    hidden_BLD = packed_hidden(model, visual_BVD, batch)
    asked = batch["labels"] >= 0
    logits = model.lm_head(hidden_BLD[asked]).float()
    labels, weights = batch["labels"][asked], batch["weights"][asked]
    losses = F.cross_entropy(logits, labels, reduction="none")
    first = batch["first"][asked]
    answers = first & (weights == 1)
    with torch.no_grad():
        right = (logits.argmax(-1) == labels) & answers
        facts = {
            "right": right.sum() / answers.sum().clamp(min=1),
            "answer_loss": (losses * answers).sum() / answers.sum().clamp(min=1),
        }
    return (losses * weights).sum() / weights.sum(), facts


def hardware(device: str) -> str:
    """What this runs on, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{torch.get_num_threads()} threads of {name}"


def _thinned(history: list[dict[str, float]], points: int = 40) -> list[dict[str, float]]:
    """A curve of at most so many points, the last one included."""
    every = max(1, -(-len(history) // points))
    kept = history[every - 1 :: every]
    if history and kept[-1:] != history[-1:]:
        kept.append(history[-1])
    return [{name: round(value, 5) for name, value in point.items()} for point in kept]
