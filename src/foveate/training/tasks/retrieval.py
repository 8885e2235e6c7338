"""A small CLIP that finds clips by their captions, and CenterCLIP and TempMe on it.

Legend: B clips, F frames of each, N held-out clips, E embedding size.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import CLIPModel

import foveate
from foveate.attach.attachment import Attachment
from foveate.core import Method
from foveate.methods.centerclip import Algorithm, CenterCLIP
from foveate.methods.tempme import TempMe
from foveate.training.loop import Tell
from foveate.training.sizes import Stage
from foveate.training.task import Outcome, Task, TaskSize, standard_error
from foveate.training.tasks.retrieval_data import COLOR_FACTS, FRAMES, make_clips
from foveate.training.tasks.retrieval_model import (
    TempMeInTraining,
    Updates,
    cls_of_clips,
    embed_captions,
    embed_clips,
    make_clip,
    project,
    save_updates,
    updated,
)

#: Numbers of the streams of random clips.
_STREAMS = {
    "frames": 0,
    "clips": 1,
    "unmerged": 2,
    "tempme": 2,
    "centerclip": 2,
    "random": 2,
    "held-out": 3,
}
_BATCH = 20  # held-out clips embedded at once
_METRIC = "text-to-video R@1 (%)"
#: Fractions of the patches that CenterCLIP keeps: the published one, and few.
SHARES = (1 / 3, 1 / 12)
#: Stages that fine-tune a copy with patches clustered, and with random ones in place of medoids.
SAMPLED: dict[str, Algorithm] = {"centerclip": "k_medoids", "random": "random"}
_NAMING = 8.0  # weight of naming objects
_NEAR = 2.0  # points that TempMe may lose
#: The largest logit scale of CLIP.
_MOST_SCALE = math.log(100)


class Retrieval(Task):
    """Captions of clips of moving shapes, and a CLIP that finds the clip of a caption.

    The first stage trains the CLIP on single frames, the second on the mean of a clip's frames. Two
    train low-rank updates with everything else frozen, without merging and with TempMe in place;
    two train copies of the CLIP, with CenterCLIP and with random tokens in place of medoids; all
    four equally long on the same clips.

    Example:
        >>> task = Retrieval("tiny")
        >>> task.batch("clips", 0)["pixels"].shape
        torch.Size([2, 4, 3, 40, 40])

    Source: CenterCLIP, arXiv 2205.00823; TempMe, arXiv 2409.01156; the mean of frames is
    CLIP4Clip's, arXiv 2104.08860. Data, sizes, learning rates and optimisers are ours.
    """

    name: ClassVar[str] = "retrieval"

    def __init__(self, size: TaskSize = "small", seed: int = 0) -> None:
        super().__init__(size, seed)
        tiny = size == "tiny"
        self.stages = {
            "frames": Stage(3, 4, 3e-3, 1) if tiny else Stage(420, 192, 4e-3, 20),
            "clips": Stage(2, 2, 1e-3, 1) if tiny else Stage(50, 64, 1e-3, 10),
            "unmerged": Stage(2, 2, 3e-3, 1) if tiny else Stage(40, 32, 2e-3, 10),
            "tempme": Stage(2, 2, 3e-3, 1) if tiny else Stage(40, 32, 2e-3, 10),
            "centerclip": Stage(2, 2, 1e-3, 1) if tiny else Stage(40, 32, 3e-4, 10),
            "random": Stage(2, 2, 1e-3, 1) if tiny else Stage(40, 32, 3e-4, 10),
        }
        self.vision, self.text = ((32, 4, 2), (32, 1, 2)) if tiny else ((96, 8, 3), (64, 2, 2))
        self.tempme = TempMe(layers=(1, 2, 3) if tiny else (5, 6, 7), clip_frames=FRAMES)
        self.clips = 20 if tiny else 600
        self.rounds = 0 if tiny else 9  # of the timing

    def build(self) -> dict[str, nn.Module]:
        """The CLIP; low-rank updates, without merging and of TempMe; copies for CenterCLIP."""
        clip = make_clip(self.vision, self.text)
        clip.set_attn_implementation("eager")  # on a CPU the fused kernel's gradient is slow
        return {
            "clip": clip,
            "objects": nn.Linear(self.vision[0], COLOR_FACTS),
            "unmerged": Updates(clip),
            "tempme": Updates(clip, self.tempme, FRAMES),
            "centerclip": copy.deepcopy(clip),
            "random": copy.deepcopy(clip),
        }

    def groups(self, stage: str, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, float]]:
        """The CLIP first, then updates alone, then each copy."""
        if stage == "frames":
            return [(modules["clip"], 1.0), (modules["objects"], 1.0)]
        return [(modules[stage if stage in modules else "clip"], 1.0)]

    def begin(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Give the copies what the CLIP has learned."""
        if stage in SAMPLED:
            modules[stage].load_state_dict(modules["clip"].state_dict())

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """Clips with captions: "pixels" uint8 [B, F, 3, H, W], "words" int64 [B, L]."""
        frames = {"frames": 1, "clips": 4}.get(stage, FRAMES)
        seed = (self.seed, _STREAMS[stage], step)
        return make_clips(seed, self.stages[stage].clips, frames)

    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Symmetric cross-entropy of the similarities of all clips and captions of the batch.

        The first stage also names shape and places of the object of every colour.
        """
        clip = _model(stage, modules)
        with self._as_trained(stage, modules):
            cls_BfD = cls_of_clips(clip, batch["pixels"], FRAMES if stage == "tempme" else 1)
            clip_BE = project(clip, cls_BfD)
            text_BE = embed_captions(clip, batch["words"])
        logits_BB = clip.logit_scale.exp() * text_BE @ clip_BE.t()
        own_B = torch.arange(len(logits_BB), device=logits_BB.device)
        loss = (cross_entropy(logits_BB, own_B) + cross_entropy(logits_BB.t(), own_B)) / 2
        if stage == "frames":
            facts_BK = modules["objects"](cls_BfD[:, 0]).float()
            named_BK = batch["objects"].flatten(1).float()
            loss = loss + _NAMING * binary_cross_entropy_with_logits(facts_BK, named_BK)
        return loss, {"found": (logits_BB.argmax(1) == own_B).float().mean()}

    @contextmanager
    def _as_trained(self, stage: str, modules: dict[str, nn.Module]) -> Iterator[None]:
        """The CLIP with the method or the updates of a stage."""
        clip = _model(stage, modules)
        if stage in SAMPLED:
            method = CenterCLIP(algorithm=SAMPLED[stage], clip_frames=FRAMES)
            with foveate.reduce(clip, method, retain=SHARES[0]):
                yield
            return
        if stage not in modules:
            yield
            return
        updates = cast(Updates, modules[stage])
        with updated(clip.text_model, updates.text):
            if stage == "unmerged":
                with updated(clip.vision_model, updates.visual):
                    yield
                return
            options = {**vars(self.tempme), "updates": updates}
            with foveate.reduce(clip, TempMeInTraining(**options)):
                yield

    def after_step(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Bound the scale of the logits as CLIP does."""
        scale = _model(stage, modules).logit_scale
        scale.data.clamp_(max=_MOST_SCALE)

    # -- measurement ------------------------------------------------------------------------------

    def measure(self, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
        """Retrieval among held-out clips: untouched, with CenterCLIP and with TempMe."""
        clips = [_model(stage, modules) for stage in ("", *SAMPLED)]
        for clip in clips:
            clip.set_attn_implementation("sdpa")  # the fused kernel, whose forward pass is fast
        with tempfile.TemporaryDirectory() as folder:
            weights = str(Path(folder) / "tempme.safetensors")
            save_updates(cast(Updates, modules["tempme"]), weights)
            entries = self._entries(weights)
            held_out = list(self._held_out())
            found = []
            for number, entry in enumerate(entries):
                found.append(self._found(entry, modules, held_out))
                tell("evaluation", number + 1, len(entries), {})
            by_name = {entry.name: entry for entry in entries}
            speed = self._speed(modules, by_name, held_out[0]["pixels"])
        for clip in clips:
            clip.set_attn_implementation("eager")
        return _outcomes(entries, found, speed)

    def _entries(self, weights: str) -> list[_Entry]:
        """What is measured, in the order of the rows."""
        rows = [_Entry("untouched")]
        for share in SHARES:
            for algorithm in SAMPLED.values():
                method = CenterCLIP(algorithm=algorithm, clip_frames=FRAMES)
                seeds = (0, 1) if algorithm == "random" else (0,)
                name = _centerclip(algorithm, share) + ", no training"
                rows.append(_Entry(name, method, share, seeds=seeds))
        for stage, algorithm in SAMPLED.items():
            method = CenterCLIP(algorithm=algorithm, clip_frames=FRAMES)
            seeds = (0, 1) if algorithm == "random" else (0,)
            name = _centerclip(algorithm)
            rows.append(_Entry(name, method, SHARES[0], updates=stage, seeds=seeds))
        trained = replace(self.tempme, weights=weights)
        return [
            *rows,
            _Entry("untouched, fine-tuned alike", updates="unmerged"),
            _Entry("tempme", trained, None, FRAMES, "tempme"),
            _Entry("tempme, no training", self.tempme, None, FRAMES),
        ]

    @contextmanager
    def _attached(
        self, entry: _Entry, modules: dict[str, nn.Module], seed: int
    ) -> Iterator[Attachment | None]:
        """The CLIP as an entry asks for it."""
        clip = _model(entry.updates, modules)
        with ExitStack() as stack:
            if entry.updates and entry.updates not in SAMPLED:
                updates = cast(Updates, modules[entry.updates])
                stack.enter_context(updated(clip.text_model, updates.text))
                if entry.method is None:
                    stack.enter_context(updated(clip.vision_model, updates.visual))
            if entry.method is None:
                yield None
                return
            yield stack.enter_context(
                foveate.reduce(clip, entry.method, retain=entry.retain, seed=seed)
            )

    def _found(
        self, entry: _Entry, modules: dict[str, nn.Module], held_out: list[dict[str, Tensor]]
    ) -> _Found:
        """Which captions find their clip, and what the clips cost."""
        clip = _model(entry.updates, modules)
        device = clip.logit_scale.device
        hits, back, tokens, share = [], [], 1.0, 1.0
        for seed in entry.seeds:
            clips, texts = [], []
            with self._attached(entry, modules, seed) as run:
                for batch in held_out:
                    pixels, words = (batch[key].to(device) for key in ("pixels", "words"))
                    clips.append(embed_clips(clip, pixels, entry.cls_rows))
                    texts.append(embed_captions(clip, words))
            if run is not None:
                flops = run.report.flops
                share = flops["reduced"]["total"] / flops["untouched"]["total"]
                stage = run.report.stages[0]
                tokens = sum(stage.after) / sum(stage.before)
            likeness_NN = torch.cat(texts) @ torch.cat(clips).t()
            own_N = torch.arange(len(likeness_NN), device=device)
            hits.append((likeness_NN.argmax(1) == own_N).float().cpu())
            back.append((likeness_NN.argmax(0) == own_N).float().mean().cpu())
        return _Found(torch.stack(hits).mean(0), float(torch.stack(back).mean()), tokens, share)

    def _held_out(self) -> Iterator[dict[str, Tensor]]:
        for first in range(0, self.clips, _BATCH):
            yield make_clips((self.seed, _STREAMS["held-out"], first), _BATCH)

    def _speed(
        self, modules: dict[str, nn.Module], entries: dict[str, _Entry], pixels: Tensor
    ) -> dict[str, float]:
        """How many times faster clips are embedded with a method: medians of alternating runs."""
        pixels = pixels.to(_model("", modules).logit_scale.device)
        timed = {name: entries[name] for name in ("untouched", _centerclip(), "tempme")}
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(self.rounds):
            for name, entry in timed.items():
                with self._attached(entry, modules, 0):
                    began = time.perf_counter()
                    # Reading the result waits for an accelerator.
                    embed_clips(_model(entry.updates, modules), pixels, entry.cls_rows).sum().item()
                    seconds[name].append(time.perf_counter() - began)
        if not self.rounds:
            return {}
        return {name: median(seconds["untouched"]) / median(x) for name, x in seconds.items()}


def _model(stage: str, modules: dict[str, nn.Module]) -> CLIPModel:
    return cast(CLIPModel, modules[stage if stage in SAMPLED else "clip"])


@dataclass(frozen=True)
class _Entry:
    """What a row is measured on: a method, its budget, and what which stage has trained for it."""

    name: str
    method: Method | None = None
    retain: float | None = None
    cls_rows: int = 1
    updates: str = ""
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class _Found:
    """Of every caption how often it finds its clip [N], and of clips; fractions of the cost."""

    hits_N: Tensor
    back: float
    tokens: float
    flops: float

    @property
    def value(self) -> float:
        return 100 * self.hits_N.double().mean().item()


def _centerclip(algorithm: str = "k_medoids", share: float = SHARES[0]) -> str:
    chosen = "" if algorithm == "k_medoids" else f', algorithm="{algorithm}"'
    return f"centerclip(retain={share:.3g}{chosen})"


def _outcomes(entries: list[_Entry], found: list[_Found], speed: dict[str, float]) -> list[Outcome]:
    by_name = {entry.name: one for entry, one in zip(entries, found, strict=True)}
    unmerged = max(
        (by_name["untouched"], by_name["untouched, fine-tuned alike"]), key=lambda one: one.value
    )
    untrained = ", no training"
    pairs = {_centerclip(): _centerclip("random")}
    for share in SHARES:
        pairs[_centerclip(share=share) + untrained] = _centerclip("random", share) + untrained
    rows = []
    for name, one in by_name.items():
        bar, met, gap = "", None, ""
        if name in pairs:
            other = by_name[pairs[name]]
            bar, met = "better than random tokens", one.value > other.value
            gap = _versus(one, other, "random tokens")
        elif name == "tempme":
            bar = "within 2 points of no merging, at most 20 % of the tokens"
            met = one.value >= unmerged.value - _NEAR and one.tokens <= 0.2
            gap = _versus(one, unmerged, "the better one without merging")
        facts = [
            gap,
            "" if name.startswith("untouched") else f"{one.tokens:.1%} of the tokens",
            f"video-to-text {100 * one.back:.1f}",
            f"{speed[name]:.2f} times as fast" if name in speed and one.flops < 1 else "",
        ]
        note = "; ".join(fact for fact in facts if fact)
        rows.append(Outcome(name, _METRIC, one.value, one.flops, bar, met, note=note))
    return rows


def _versus(one: _Found, other: _Found, name: str) -> str:
    gap_N = 100 * (one.hits_N - other.hits_N)
    error = standard_error(gap_N)
    return f"{float(gap_N.mean()):+.1f} points of {name}, standard error {error:.1f}"
