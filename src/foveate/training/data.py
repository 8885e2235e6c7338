"""Batches of the world, by step number: the same order on every machine and after every resume.

Legend: B clips (or frames), T frames, H, W pixels, C colours, N cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from foveate.training.dense import dense_labels
from foveate.training.packing import DESCRIBE, Exchange, exchange, pack
from foveate.training.sizes import Size
from foveate.world import Question, Sample, World, render
from foveate.world.draw import Draw

#: Longest list of exchanges about one clip, not counting the caption.
MAX_QUESTIONS = 10
#: Questions of one task about one clip.
PER_TASK = 2
_CAPTION_WEIGHT = 0.3


class TowerBatches(Dataset):
    """Step -> frames with the labels of their patches and tokens.

    Args:
        size: of the model.
        seed: of the world.
        first: number of the first clip of step 0.
    """

    def __init__(self, size: Size, seed: int, first: int = 0) -> None:
        self.size, self.first = size, first
        self.world = World(seed, "train", frames=size.frames, size=size.image, natural=size.natural)

    def __getitem__(self, step: int) -> dict[str, Any]:
        size, pixels = self.size, []
        cells = _cells(size)
        labels: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in cells}
        for index in range(size.tower.clips):
            scene = self.world.sample(self.first + step * size.tower.clips + index).scene
            draw = Draw(scene.name, "frames")
            frames = sorted(draw.sample(range(size.frames), size.frames_per_clip))
            pixels_THWC, masks_THW = render(scene, size.image, size.image, frames=frames)
            pixels.append(pixels_THWC)
            for name, cell in cells.items():
                labels[name].append(dense_labels(scene, masks_THW, frames, cell))
        batch: dict[str, Any] = {"frames": torch.from_numpy(np.concatenate(pixels))}
        return batch | {name: _joined(parts) for name, parts in labels.items()}


def _cells(size: Size) -> dict[str, int]:
    """Side in pixels of what is labelled: the tower's patches, the language model's tokens."""
    return {"patches": size.patch, "tokens": 2 * size.patch}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The labels of several clips as those of one row of frames."""
    return {
        key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]
    }


class AnswerBatches(Dataset):
    """Step -> clips with their packed questions and captions.

    Args:
        size: of the model.
        seed: of the world.
        clips: per step.
        first: number of the first clip of step 0.
        split: of the world.
        captions: whether a caption is asked for, too.
        labels: whether the labels of all frames come with them.
    """

    def __init__(
        self,
        size: Size,
        seed: int,
        clips: int,
        first: int = 0,
        *,
        split: str = "train",
        captions: bool = True,
        labels: bool = False,
    ) -> None:
        self.size, self.clips, self.first = size, clips, first
        self.captions, self.labels = captions, labels
        self.world = World(
            seed,
            split,  # pyright: ignore[reportArgumentType]
            frames=size.frames,
            size=size.image,
            natural=size.natural,
            per_task=PER_TASK,
        )

    def __getitem__(self, step: int) -> dict[str, Any]:
        begin = self.first + step * self.clips
        samples = [self.world.sample(begin + index) for index in range(self.clips)]
        rows = [self._exchanges(sample) for sample in samples]
        batch: dict[str, Any] = pack(rows, self.size.visual_tokens)
        batch["frames"] = torch.from_numpy(np.stack([one.frames_THWC for one in samples]))
        if self.labels:
            frames = list(range(self.size.frames))
            for name, cell in _cells(self.size).items():
                batch[name] = _joined(
                    [dense_labels(one.scene, one.masks_THW, frames, cell) for one in samples]
                )
        return batch

    def asked(self, sample: Sample) -> list[Question]:
        """The questions that are asked about a clip."""
        if len(sample.questions) <= MAX_QUESTIONS:
            return list(sample.questions)
        return Draw(sample.name, "asked").sample(sample.questions, MAX_QUESTIONS)

    def _exchanges(self, sample: Sample) -> list[Exchange]:
        asked = [exchange(question.text, question.answer) for question in self.asked(sample)]
        if self.captions:
            asked.append(exchange(DESCRIBE, sample.caption, _CAPTION_WEIGHT))
        return asked


def batches(
    data: Dataset, steps: range, workers: int, *, pinned: bool = False
) -> Iterator[dict[str, Any]]:
    """The batches of these steps, in order.

    Args:
        data: step -> batch.
        steps: which.
        workers: processes that make batches ahead; 0: made here, when they are needed.
        pinned: in page-locked memory, from where copies to a GPU need not wait.
    """
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=list(steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pinned,
    )
    return iter(loader)
