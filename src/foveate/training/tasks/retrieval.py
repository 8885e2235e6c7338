"""A small CLIP that finds clips by their captions, and CenterCLIP and TempMe on it.

Legend: B clips, f [CLS] tokens of each, D channels, E embedding size, K facts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import foveate
from foveate.methods.centerclip import CenterCLIP
from foveate.methods.tempme import TempMe
from foveate.training.loop import Tell
from foveate.training.sizes import Stage
from foveate.training.task import Outcome, Task, TaskSize
from foveate.training.tasks.retrieval_data import COLOR_FACTS, FRAMES, make_clips
from foveate.training.tasks.retrieval_measure import (
    COPIES,
    LOW_RANK,
    SAMPLED,
    Measurement,
    clip_of,
)
from foveate.training.tasks.retrieval_model import (
    TempMeInTraining,
    Updates,
    cls_of_clips,
    embed_captions,
    make_clip,
    project,
    updated,
)

#: Numbers of the streams of random clips; all fine-tunings see the same ones.
_STREAMS = {"frames": 0, "clips": 1}
_TUNING = 2
#: Frames of a segment, and how many segments of a clip the copies are fine-tuned on.
_SEGMENT, _SEGMENTS = 3, 2
#: Weights of naming objects.
_NAMING, _NAMING_COPIES = 8.0, 4.0
#: The largest logit scale of CLIP.
_MOST_SCALE = math.log(100)


class Retrieval(Task):
    """Captions of clips of moving shapes, and a CLIP that finds the clip of a caption.

    The first stage trains the CLIP on single frames, the second on the mean of a clip's frames. Two
    train low-rank updates with everything else frozen, without merging and with TempMe in place.
    The others train copies of the CLIP as a whole: with CenterCLIP and with random tokens in place
    of medoids, at several shares of the patches, and with all tokens. All go on from the second
    stage, the updates on the same clips and the copies on the same clips.

    Example:
        >>> task = Retrieval("tiny")
        >>> task.batch("clips", 0)["pixels"].shape
        torch.Size([2, 4, 3, 60, 60])

    Source: CenterCLIP, arXiv 2205.00823; TempMe, arXiv 2409.01156; the mean of frames is
    CLIP4Clip's, arXiv 2104.08860. Data, sizes, learning rates and optimisers are ours.
    """

    name: ClassVar[str] = "retrieval"

    def __init__(self, size: TaskSize = "small", seed: int = 0) -> None:
        super().__init__(size, seed)
        tiny = size == "tiny"
        low_rank = Stage(2, 2, 3e-3, 1) if tiny else Stage(60, 32, 2e-3, 10)
        whole = Stage(2, 2, 1e-3, 1) if tiny else Stage(100, 64, 5e-4, 10)
        self.stages = {
            "frames": Stage(3, 4, 3e-3, 1) if tiny else Stage(1200, 192, 4e-3, 20),
            "clips": Stage(2, 2, 1e-3, 1) if tiny else Stage(150, 64, 1e-3, 10),
            **dict.fromkeys(LOW_RANK, low_rank),
            **dict.fromkeys(COPIES, whole),
        }
        self.vision, self.text = ((32, 4, 2), (32, 1, 2)) if tiny else ((96, 8, 3), (64, 2, 2))
        self.tempme = TempMe(layers=(1, 2, 3) if tiny else (5, 6, 7), clip_frames=FRAMES)
        self.galleries, self.gallery = (2, 10) if tiny else (2, 600)  # of held-out clips
        self.rounds = 0 if tiny else 9  # of the timing

    def build(self) -> dict[str, nn.Module]:
        """The CLIP; low-rank updates, without merging and of TempMe; copies of the CLIP."""
        clip = make_clip(self.vision, self.text)
        clip.set_attn_implementation("eager")  # on a CPU the fused kernel's gradient is slow
        return {
            "clip": clip,
            "objects": nn.Linear(self.vision[0], COLOR_FACTS),
            "unmerged": Updates(clip),
            "tempme": Updates(clip, self.tempme, FRAMES),
            **{stage: copy.deepcopy(clip) for stage in COPIES},
        }

    def groups(self, stage: str, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, float]]:
        """The CLIP first, then updates alone, then each copy."""
        if stage in _STREAMS:
            return [(modules["clip"], 1.0), (modules["objects"], 1.0)]
        return [(modules[stage], 1.0)]

    def begin(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Give the copies what the CLIP has learned."""
        if stage in COPIES:
            modules[stage].load_state_dict(modules["clip"].state_dict())

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """Clips with captions: "pixels" uint8 [B, F, 3, H, W], "words" int64 [B, L]; the "step".

        F is 1 for single frames, 4 for clips, two segments of three for copies, and all of them for
        updates.
        """
        frames, together = {"frames": (1, 1), "clips": (4, 1)}.get(stage, (FRAMES, 1))
        if stage in COPIES:
            frames, together = _SEGMENTS * _SEGMENT, _SEGMENT
        seed = (self.seed, _STREAMS.get(stage, _TUNING), step)
        clips = make_clips(seed, self.stages[stage].clips, frames, together)
        return {**clips, "step": torch.tensor(step)}

    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Symmetric cross-entropy of the similarities of all clips and captions of the batch.

        All stages but those of low-rank updates also name shape and places of the object of every
        colour, from the mean of the [CLS] tokens.
        """
        clip = clip_of(stage, modules)
        with self._as_trained(stage, modules, int(batch["step"])):
            cls_BfD = cls_of_clips(clip, batch["pixels"], FRAMES if stage == "tempme" else 1)
            clip_BE = project(clip, cls_BfD)
            text_BE = embed_captions(clip, batch["words"])
        logits_BB = clip.logit_scale.exp() * text_BE @ clip_BE.t()
        own_B = torch.arange(len(logits_BB), device=logits_BB.device)
        loss = (cross_entropy(logits_BB, own_B) + cross_entropy(logits_BB.t(), own_B)) / 2
        if stage not in LOW_RANK:
            facts_BK = modules["objects"](cls_BfD.mean(1)).float()
            named_BK = batch["objects"].flatten(1).float()
            naming = binary_cross_entropy_with_logits(facts_BK, named_BK)
            loss = loss + (_NAMING_COPIES if stage in COPIES else _NAMING) * naming
        return loss, {"found": (logits_BB.argmax(1) == own_B).float().mean()}

    @contextmanager
    def _as_trained(self, stage: str, modules: dict[str, nn.Module], step: int) -> Iterator[None]:
        """The CLIP with the method or the updates of a stage."""
        clip = clip_of(stage, modules)
        if stage in SAMPLED:
            algorithm, share = SAMPLED[stage]
            method = CenterCLIP(algorithm=algorithm, clip_frames=_SEGMENTS * _SEGMENT)
            # Another seed every step, or random tokens would be the same ones all the time.
            with foveate.reduce(clip, method, retain=share, seed=step):
                yield
            return
        if stage not in LOW_RANK:
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
        scale = clip_of(stage, modules).logit_scale
        scale.data.clamp_(max=_MOST_SCALE)

    def measure(self, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
        """Retrieval among held-out clips: untouched, with CenterCLIP and with TempMe."""
        measurement = Measurement(
            modules, self.tempme, self.seed, self.galleries, self.gallery, self.rounds
        )
        return measurement.outcomes(tell)
