"""Print the tables of docs/streaming.md: questions answered from streams, and what memory costs.

    python scripts/streaming.py --clips 20

The embedded model watches generated clips frame by frame and is asked afterwards, from what its
memory kept. It was trained on clips of 16 frames in one prompt, and not for carriers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

import foveate
from foveate.bench import is_correct, wilson
from foveate.world import World

#: What answers are worth that saw nothing.
BLIND = "16 black frames"
#: Rows of the table: what remembers, and how much of it.
MEMORIES: dict[str, dict[str, Any]] = {
    "all 16 frames": {"recipe": None, "capacity": 16},
    "the 8 most recent frames": {"recipe": None, "capacity": 8},
    "the 4 most recent frames": {"recipe": None, "capacity": 4},
    "the 1 most recent frame": {"recipe": None, "capacity": 1},
    "`uniform`, 1 in 4 tokens of every frame": {
        "recipe": "uniform",
        "capacity": 16,
        "retain": 0.25,
        "group": 1,
    },
    "`videoscan`, 16 carriers": {"recipe": "videoscan", "capacity": 17},
    "`videoscan`, renumbered": {"recipe": "videoscan", "capacity": 17, "renumber": True},
    "`videoscan(add_kv=3)`": {"recipe": "videoscan", "capacity": 17, "add_kv": 3},
    "`videoscan(add_kv=3)`, renumbered": {
        "recipe": "videoscan",
        "capacity": 17,
        "add_kv": 3,
        "renumber": True,
    },
    "`videoscan`, 7 carriers": {"recipe": "videoscan", "capacity": 8},
    BLIND: {"recipe": None, "capacity": 16},
}


#: Rows of the second table: clips that every question calls back, of 16 frames of 16 tokens.
RECALLS: dict[str, dict[str, int]] = {
    "4 of 8 clips of 2 frames, 16 tokens a frame": {
        "clip_frames": 2,
        "clips": 4,
        "frame_tokens": 16,
    },
    "2 of 8 clips of 2 frames, 16 tokens a frame": {
        "clip_frames": 2,
        "clips": 2,
        "frame_tokens": 16,
    },
    "all 8 clips of 2 frames, 4 tokens a frame": {"clip_frames": 2, "clips": 8, "frame_tokens": 4},
    "1 of 4 clips of 4 frames, 4 tokens a frame": {"clip_frames": 4, "clips": 1, "frame_tokens": 4},
}


def clips(count: int, split: str) -> Iterator[tuple[torch.Tensor, Any]]:
    """Frames [T, 3, H, W] and questions of generated clips."""
    world = World(seed=0, split=split, frames=16)
    for index in range(count):
        sample = world.sample(index)
        yield torch.from_numpy(sample.frames_THWC.copy()).permute(0, 3, 1, 2), sample.questions


def accuracy(model: Any, processor: Any, count: int, split: str) -> None:
    """One row per memory."""
    print("| Remembered | Visual slots | Questions | Right |\n| --- | ---: | ---: | ---: |")
    for name, options in MEMORIES.items():
        right = total = slots = 0
        for frames, questions in clips(count, split):
            with foveate.Stream(model, processor, **options) as stream:
                system = stream.memory.slots
                stream.push(torch.zeros_like(frames) if name == BLIND else frames)
                slots = stream.memory.slots - system
                for question in questions:
                    reply = stream.ask(question.text, max_new_tokens=6).text
                    right += is_correct(reply, question.answer, question.options)
                    total += 1
        print(f"| {name} | {slots} | {total} | {wilson(right, total)} |", flush=True)


def recalled(model: Any, processor: Any, count: int, split: str) -> None:
    """One row per way of calling back."""
    print("| Called back | Visual tokens read | Questions | Right |\n| --- | ---: | ---: | ---: |")
    for name, options in RECALLS.items():
        right = total = tokens = 0
        for frames, questions in clips(count, split):
            with foveate.Stream(model, processor, "video_streaming", **options) as stream:
                stream.push(frames)
                for question in questions:
                    answer = stream.ask(question.text, max_new_tokens=6)
                    tokens = len(answer.seconds) * options["frame_tokens"]
                    right += is_correct(answer.text, question.answer, question.options)
                    total += 1
        print(f"| {name} | {tokens} | {total} | {wilson(right, total)} |", flush=True)


def endless(model: Any, processor: Any, frames: int) -> None:
    """Memory and speed of a long stream."""
    print("| Frames seen | Remembered | Slots | Keys and values | Frames a second |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    part = torch.cat([shown for shown, _ in clips(8, "test")])
    with foveate.Stream(model, processor, "videoscan", capacity=64) as stream:
        seen = 0
        while seen < frames:
            begin = time.perf_counter()
            stream.push(part)
            rate = len(part) / (time.perf_counter() - begin)
            seen += len(part)
            if seen & (seen - 1) == 0:
                now = stream.memory
                print(
                    f"| {seen:,} | {len(now.seconds)} | {now.slots} | "
                    f"{now.num_bytes / 1024:.0f} KiB | {rate:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--split", default="test")
    parser.add_argument("--frames", type=int, default=2048)
    parser.add_argument("--only", choices=["memories", "recall", "endless"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    embedded, its_processor = foveate.embedded()
    embedded.float().eval()
    if given.only in (None, "memories"):
        accuracy(embedded, its_processor, given.clips, given.split)
    if given.only in (None, "recall"):
        recalled(embedded, its_processor, given.clips, given.split)
    if given.only in (None, "endless"):
        endless(embedded, its_processor, given.frames)
