"""How well a trained CLIP finds held-out clips: untouched, with CenterCLIP and with TempMe.

Legend: N held-out clips, G of a gallery, E embedding size.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPModel

import foveate
from foveate.attach.attachment import Attachment
from foveate.core import Method
from foveate.methods.centerclip import Algorithm, CenterCLIP
from foveate.methods.tempme import TempMe
from foveate.training.loop import Tell
from foveate.training.task import Outcome, paired_gain
from foveate.training.tasks.retrieval_data import FRAMES, make_clips
from foveate.training.tasks.retrieval_model import (
    Updates,
    embed_captions,
    embed_clips,
    save_updates,
    updated,
)

#: Number of the stream of held-out clips; those of training are lower.
HELD_OUT = 3
#: Fractions of the patches that CenterCLIP keeps: the published one, and fewer.
SHARES = (1 / 3, 1 / 6, 1 / 12)
_ALGORITHMS: dict[str, Algorithm] = {"centerclip": "k_medoids", "random": "random"}
#: Stages that fine-tune a copy with patches clustered, and with random ones in place of medoids.
SAMPLED: dict[str, tuple[Algorithm, float]] = {
    f"{name}_{round(1 / share)}": (algorithm, share)
    for share in SHARES
    for name, algorithm in _ALGORITHMS.items()
}
#: All stages that fine-tune a copy of the CLIP; the last with all tokens.
COPIES = (*SAMPLED, "whole")
#: Stages that train low-rank updates.
LOW_RANK = ("unmerged", "tempme")
_BATCH = 20  # held-out clips embedded at once
_METRIC = "text-to-video R@1 (%)"
_NEAR = 2.0  # points that TempMe may lose
_UNTRAINED = ", no training"
#: What is untouched, and fine-tuned as copies and with low-rank updates.
_UNTOUCHED, _WHOLE, _UNMERGED = (
    "untouched",
    "untouched, fine-tuned as a whole",
    "untouched, low-rank updates",
)


def clip_of(stage: str, modules: dict[str, nn.Module]) -> CLIPModel:
    """The CLIP that a stage trains, or that its updates are for."""
    return cast(CLIPModel, modules[stage if stage in COPIES else "clip"])


@dataclass(frozen=True)
class _Entry:
    """What a row is measured on: a method, its budget, and what which stage has trained for it."""

    name: str
    method: Method | None = None
    retain: float | None = None
    cls_rows: int = 1
    stage: str = ""


@dataclass(frozen=True)
class _Found:
    """Which captions find their clip [N], how many clips their caption; fractions of the cost."""

    hits_N: Tensor
    back: float
    tokens: float
    flops: float

    @property
    def value(self) -> float:
        return 100 * self.hits_N.double().mean().item()


@dataclass
class Measurement:
    """Retrieval among held-out clips with everything that was trained.

    Args:
        modules: of the task, trained.
        tempme: as it was trained.
        seed: of the task.
        galleries: how many sets of clips are searched.
        gallery: clips of each.
        rounds: of the timing; 0: none.
    """

    modules: dict[str, nn.Module]
    tempme: TempMe
    seed: int
    galleries: int
    gallery: int
    rounds: int

    def outcomes(self, tell: Tell) -> list[Outcome]:
        """One row for every method and budget.

        Args:
            tell: called as ``tell("evaluation", done, total, {})``.
        """
        clips = [clip_of(stage, self.modules) for stage in ("", *COPIES)]
        for clip in clips:
            clip.set_attn_implementation("sdpa")  # the fused kernel, whose forward pass is fast
        with tempfile.TemporaryDirectory() as folder:
            weights = str(Path(folder) / "tempme.safetensors")
            save_updates(cast(Updates, self.modules["tempme"]), weights)
            entries = self._entries(weights)
            found = {}
            for number, entry in enumerate(entries):
                found[entry.name] = self._found(entry)
                tell("evaluation", number + 1, len(entries), {})
            speed = self._speed({entry.name: entry for entry in entries})
        for clip in clips:
            clip.set_attn_implementation("eager")
        return _outcomes(found, speed)

    @cached_property
    def held_out(self) -> list[dict[str, Tensor]]:
        """Clips of a stream of their own, in batches."""
        total = self.galleries * self.gallery
        batches = range(0, total, _BATCH)
        return [make_clips((self.seed, HELD_OUT, n), min(_BATCH, total - n)) for n in batches]

    def _entries(self, weights: str) -> list[_Entry]:
        """What is measured, in the order of the rows."""
        rows = [_Entry(_UNTOUCHED), _Entry(_WHOLE, stage="whole")]
        for stage, (algorithm, share) in SAMPLED.items():
            method = CenterCLIP(algorithm=algorithm, clip_frames=FRAMES)
            rows.append(_Entry(_centerclip(share, algorithm), method, share, stage=stage))
        for algorithm, share in SAMPLED.values():
            method = CenterCLIP(algorithm=algorithm, clip_frames=FRAMES)
            rows.append(_Entry(_centerclip(share, algorithm) + _UNTRAINED, method, share))
        for share in SHARES:
            method = CenterCLIP(prop_attn=True, clip_frames=FRAMES)
            name = f"{_centerclip(share)}, attention weighted by sizes{_UNTRAINED}"
            rows.append(_Entry(name, method, share))
        trained = replace(self.tempme, weights=weights)
        return [
            *rows,
            _Entry(_UNMERGED, stage="unmerged"),
            _Entry("tempme", trained, None, FRAMES, "tempme"),
            _Entry("tempme" + _UNTRAINED, self.tempme, None, FRAMES),
        ]

    @contextmanager
    def _attached(self, entry: _Entry, seed: int = 0) -> Iterator[Attachment | None]:
        """The CLIP as an entry asks for it."""
        clip = clip_of(entry.stage, self.modules)
        with ExitStack() as stack:
            if entry.stage in LOW_RANK:
                updates = cast(Updates, self.modules[entry.stage])
                stack.enter_context(updated(clip.text_model, updates.text))
                if entry.method is None:
                    stack.enter_context(updated(clip.vision_model, updates.visual))
            if entry.method is None:
                yield None
                return
            yield stack.enter_context(
                foveate.reduce(clip, entry.method, retain=entry.retain, seed=seed)
            )

    def _found(self, entry: _Entry) -> _Found:
        """Which captions find their clip, and what the clips cost."""
        clip = clip_of(entry.stage, self.modules)
        device = clip.logit_scale.device
        clips, texts, tokens, flops = [], [], 1.0, 1.0
        for number, batch in enumerate(self.held_out):
            pixels, words = (batch[key].to(device) for key in ("pixels", "words"))
            with self._attached(entry, seed=number) as run:
                clips.append(embed_clips(clip, pixels, entry.cls_rows))
                texts.append(embed_captions(clip, words))
            if run is not None and number == 0:
                cost = run.report.flops
                flops = cost["reduced"]["total"] / cost["untouched"]["total"]
                stage = run.report.stages[0]
                tokens = sum(stage.after) / sum(stage.before)
        galleries = zip(
            torch.cat(texts).split(self.gallery), torch.cat(clips).split(self.gallery), strict=True
        )
        hits, back = [], []
        for text_GE, clip_GE in galleries:
            likeness_GG = text_GE @ clip_GE.t()
            own_G = torch.arange(len(likeness_GG), device=device)
            hits.append((likeness_GG.argmax(1) == own_G).float().cpu())
            back.append((likeness_GG.argmax(0) == own_G).float().mean().cpu())
        return _Found(torch.cat(hits), float(torch.stack(back).mean()), tokens, flops)

    def _speed(self, entries: dict[str, _Entry]) -> dict[str, float]:
        """How many times faster clips are embedded with a method: medians of alternating runs."""
        if not self.rounds:
            return {}
        pixels = self.held_out[0]["pixels"].to(clip_of("", self.modules).logit_scale.device)
        names = (_UNTOUCHED, *(_centerclip(share) for share in SHARES), "tempme")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.rounds):
            for name in names:
                clip = clip_of(entries[name].stage, self.modules)
                with self._attached(entries[name]):
                    began = time.perf_counter()
                    # Reading the result waits for an accelerator.
                    embed_clips(clip, pixels, entries[name].cls_rows).sum().item()
                    seconds[name].append(time.perf_counter() - began)
        untouched = median(seconds.pop(_UNTOUCHED))
        return {name: untouched / median(spent) for name, spent in seconds.items()}


def _centerclip(share: float, algorithm: str = "k_medoids") -> str:
    chosen = "" if algorithm == "k_medoids" else f', algorithm="{algorithm}"'
    return f"centerclip(retain={share:.3g}{chosen})"


def _outcomes(found: dict[str, _Found], speed: dict[str, float]) -> list[Outcome]:
    unmerged = max((found[_UNTOUCHED], found[_UNMERGED]), key=lambda one: one.value)
    pairs = {
        _centerclip(share) + training: _centerclip(share, "random") + training
        for share in SHARES
        for training in ("", _UNTRAINED)
    }
    rows = []
    for name, one in found.items():
        bar, met, gap = "", None, ""
        if name in pairs:
            other = found[pairs[name]]
            bar, met = "better than random tokens", one.value > other.value
            gap = _versus(one, other, "random tokens")
        elif name == "tempme":
            bar = "within 2 points of no merging, at most 20 % of the tokens"
            met = one.value >= unmerged.value - _NEAR and one.tokens <= 0.2
            gap = _versus(one, unmerged, "the better one without merging")
        facts = [
            gap,
            f"{one.tokens:.1%} of the tokens" if one.tokens < 1 else "",
            f"video-to-text {100 * one.back:.1f}",
            f"{speed[name]:.2f} times as fast" if name in speed else "",
        ]
        note = "; ".join(fact for fact in facts if fact)
        rows.append(Outcome(name, _METRIC, one.value, one.flops, bar, met, note=note))
    return rows


def _versus(one: _Found, other: _Found, name: str) -> str:
    gain, error = paired_gain(100 * one.hits_N, 100 * other.hits_N)
    return f"{gain:+.1f} points of {name}, standard error {error:.1f}"
