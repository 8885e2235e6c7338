"""`foveate train embedded`: the video LLM that ships with the package, from nothing to weights.

Three stages: the tower on labels of patches; the language model on questions and captions, the
tower frozen; everything together.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveate
from foveate.training.data import AnswerBatches, TowerBatches, batches
from foveate.training.dense import DenseHeads
from foveate.training.evaluate import VIEWS, summary, world_accuracy
from foveate.training.folder import claim, provenance, publish, stage_facts, version_note
from foveate.training.loop import Run, Tell, make_optimisers
from foveate.training.model import build_model, save_pretrained
from foveate.training.packing import frame_tokens, join_frames, packed_hidden
from foveate.training.sizes import Size
from foveate.world.backgrounds import natural_pictures

#: The stages in order, as attributes of a size.
STAGES = ("tower", "answers", "joint")
#: Number of the first clip of each: clips of different stages never meet.
_FIRST_CLIP = {"tower": 0, "answers": 10_000_000, "joint": 20_000_000}
#: Share of the labels' loss in the joint stage.
_DENSE_WEIGHT = 0.3


@dataclass
class EmbeddedTraining:
    """Training of one size, in one folder.

    The folder holds the settings (`training.json`), a checkpoint of each stage (`tower.pt`,
    `answers.pt`, `joint.pt`) and at the end the model with its `card.json`. A training that is
    killed at any moment goes on from the last checkpoint, to the same weights on the same machine.

    Attributes:
        size: which.
        folder: where checkpoints and the finished model go.
        device: where to train: "cpu", "cuda", "cuda:1".
        seed: of weights and clips.
        workers: processes that make clips; 0: made in this one.
        clips: held-out clips of the final evaluation.
        resume: go on in a folder that has been trained in; a new folder is begun all the same.
        every: steps between checkpoints.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from foveate.training.sizes import size_named
        >>> training = EmbeddedTraining(size_named("tiny"), Path("tiny"), workers=0, clips=4)
        >>> card = training.run()
        >>> list(card["stages"])
        ['tower', 'answers', 'joint']
    """

    size: Size
    folder: Path
    device: str = "cpu"
    seed: int = 0
    workers: int = 1
    clips: int = 1024
    resume: bool = False
    every: int = 200

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("clips", 1), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    def run(self, tell: Tell = lambda *_: None) -> dict[str, Any]:
        """Train what is left, evaluate, write the model and its card; returns the card.

        Args:
            tell: called with the stage (at last "evaluation"), steps done, steps of the stage and
                means since the last call.

        Raises:
            FileExistsError: the folder holds a finished model, or a training and `resume` is off,
                or something else.
            ValueError: `resume` with other settings, or another release (0.1, 0.2), than those the
                folder was begun with; another patch (0.1.0, 0.1.1) gives a warning.
            TrainingError: the loss or a gradient is not finite.
            MissingDependencyError: the size needs natural pictures, and `foveate[demo]` is missing.
        """
        if self.size.natural:
            natural_pictures()  # Says what to install before anything is written.
        settings = {"size": self.size.as_dict(), "seed": self.seed}
        claim(self.folder, settings, resume=self.resume)
        model: Any = build_model(self.size, self.seed)
        model.to(self.device)
        if not self._on_gpu:
            # Fused attention is slow on CPU in the backward pass of many short sequences.
            model.set_attn_implementation({"vision_config": "eager"})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            heads = DenseHeads(self.size.vision[0], self.size.text[0]).to(self.device)
        model.train()
        runs = []
        for name in STAGES:
            run = self._prepare(name, model, heads)
            run.train(partial(self._batches, run), tell)
            runs.append(run)
        # What is evaluated is what is stored: weights rounded to the stored type.
        model.to(getattr(torch, self.size.dtype)).float()
        card = self._card(model, runs, tell)
        self._finish(model.to(getattr(torch, self.size.dtype)), card)
        return card

    def version_note(self) -> str | None:
        """What to know about going on with a training that another patch of foveate began.

        Raises:
            ValueError: another release began it (0.1, 0.2), where data and losses may differ.
        """
        return version_note(self.folder)

    def _finish(self, model: Any, card: dict[str, Any]) -> None:
        publish(self.folder, partial(save_pretrained, model, self.size), card)

    # -- stages ---------------------------------------------------------------------------------

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def _batches(self, run: Run, steps: range) -> Iterable[dict[str, Any]]:
        """The data of a stage."""
        first = _FIRST_CLIP[run.name]
        if run.name == "tower":
            data = TowerBatches(self.size, self.seed, first)
        else:
            labels = run.name == "joint"
            data = AnswerBatches(self.size, self.seed, run.stage.clips, first, labels=labels)
        return batches(data, steps, self.workers, pinned=self._on_gpu)

    def _prepare(self, name: str, model: Any, heads: DenseHeads) -> Run:
        """A stage with its optimisers, everything else frozen or left out."""
        inner = model.model
        stage = getattr(self.size, name)
        model.requires_grad_(True)
        groups: list[tuple[nn.Module, float]]
        if name == "tower":
            groups = [(inner.vision_tower, 1.0), (inner.multi_modal_projector, 1.0), (heads, 1.0)]
        else:
            groups = [(inner.language_model, 1.0), (inner.multi_modal_projector, 0.5)]
            if name == "joint":
                groups += [(inner.vision_tower, 1.0), (heads, 1.0)]
            else:
                inner.vision_tower.requires_grad_(False)
        optimisers = make_optimisers(groups, stage.rate)
        if name != "tower":
            newline = {"params": [inner.image_newline], "lr": stage.rate, "peak": stage.rate}
            optimisers[-1].add_param_group(newline)

        def loss(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                made = self._on_device(batch)
                if name == "tower":
                    return heads.loss(*frame_tokens(model, made["frames"]), made)
                return answer_loss(model, made, heads if name == "joint" else None)

        modules = {"model": model, "heads": heads}
        return Run(name, stage, modules, optimisers, loss, self.folder, self.every)

    def _on_device(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return {name: self._on_device(value) for name, value in batch.items()}
        return batch.to(self.device, non_blocking=True)

    # -- result ---------------------------------------------------------------------------------

    def _card(self, model: Any, runs: Iterable[Run], tell: Tell) -> dict[str, Any]:
        """What was trained, how, on what, and how well it answers."""
        began = time.perf_counter()
        accuracy, questions = {}, {}
        for done, view in enumerate(VIEWS):
            tell("evaluation", done, len(VIEWS), {})
            counts = world_accuracy(
                model, self.size, seed=self.seed, split="test", clips=self.clips, view=view
            )
            accuracy[view] = summary(counts)
            questions = {task: asked for task, (_, asked) in counts.items() if asked}
        tell("evaluation", len(VIEWS), len(VIEWS), {})
        return {
            "foveate": foveate.__version__,
            "size": self.size.as_dict(),
            "seed": self.seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "visual_tokens": self.size.visual_tokens,
            **provenance(self.device),
            "stages": stage_facts(runs, "clips"),
            "test": {
                "split": "test",
                "clips": self.clips,
                "questions": questions,
                "accuracy": accuracy,
            },
            "evaluation_seconds": round(time.perf_counter() - began, 1),
        }


def answer_loss(
    model: Any, batch: dict[str, Any], heads: DenseHeads | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted cross entropy of answers and captions, and the fraction of answers that is right.

    Args:
        model: a `LlavaOnevisionForConditionalGeneration`.
        batch: of `AnswerBatches`.
        heads: read-outs whose loss is added, for a batch with labels; None leaves the tower out of
            the gradient.
    """
    frames_BTHWC = batch["frames"]
    features_BPD, tokens_BNE = frame_tokens(model, frames_BTHWC.flatten(0, 1), frozen=heads is None)
    hidden_BLD = packed_hidden(model, join_frames(model, tokens_BNE, len(frames_BTHWC)), batch)
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
    loss = (losses * weights).sum() / weights.sum()
    if heads is not None:
        dense, dense_facts = heads.loss(features_BPD, tokens_BNE, batch)
        loss, facts = loss + _DENSE_WEIGHT * dense, {**facts, **dense_facts}
    return loss, facts
