"""How fast the world makes clips, on one core.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_world.py --benchmark-enable \
        --benchmark-columns=min,median,rounds --benchmark-sort=name

Each round makes CLIPS clips of 16 frames with masks, questions and captions; the parts are timed on
their own, too. Without `--benchmark-enable` every case runs once and only its result is checked.
"""

from __future__ import annotations

import itertools

import pytest

from foveate.world import World, render

CLIPS = 20
CASES = {
    "64": {"size": 64},
    "112": {"size": 112},
    "224": {"size": 224},
    "112-natural": {"size": 112, "natural": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_clips(benchmark, case: str) -> None:
    world = World(split="train", **CASES[case])
    if "natural" in case:
        pytest.importorskip("av")
        _ = world.sample(0).frames_THWC  # decodes the pictures, once
    numbers = itertools.count()

    def make() -> int:
        first, asked = next(numbers) * CLIPS, 0
        for index in range(first, first + CLIPS):
            sample = world.sample(index)
            assert sample.frames_THWC.shape[0] == len(sample.masks_THW) == 16
            asked += len(sample.questions) + bool(sample.caption)
        return asked

    benchmark.extra_info["clips"] = CLIPS
    assert benchmark(make) > CLIPS
    if benchmark.enabled:
        print(f"\n{case}: {CLIPS / benchmark.stats['median']:.0f} clips/s")


@pytest.mark.parametrize("part", ["scenes", "questions", "masks"])
def test_parts(benchmark, part: str) -> None:
    world = World(split="train", size=112)
    scenes = [world.sample(index).scene for index in range(CLIPS)]

    def make() -> int:
        if part == "scenes":
            return sum(len(world.sample(index).scene.sprites) for index in range(CLIPS))
        if part == "questions":
            return sum(len(world.sample(index).questions) for index in range(CLIPS))
        return sum(int(render(scene, 112, 112)[1].max() > 0) for scene in scenes)

    assert benchmark(make) > 0
