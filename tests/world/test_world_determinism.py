from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.world import SPLITS, TASKS, Sample, World, questions_of, render, sample_scene
from foveate.world.draw import Draw

GOLDENS = Path(__file__).parents[1] / "goldens" / "world"
DIGEST = """
import hashlib
from foveate.world import World
found = hashlib.sha256()
for index in (5, 0, 3):
    sample = World(7, "val", frames=9, size=(40, 56)).sample(index)
    for part in (sample.scene, sample.questions, sample.caption, sample.policies):
        found.update(repr(part).encode())
    found.update(sample.frames_THWC.tobytes() + sample.masks_THW.tobytes())
print(found.hexdigest())
"""


def digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def words_of(sample: Sample) -> str:
    return digest(sample.scene, sample.questions, sample.caption)


def cells(pixels_HWC: np.ndarray) -> np.ndarray:
    """Mean levels of the 8 x 8 cells of a frame of 64 x 64 pixels: float64 [8, 8, 3]."""
    return pixels_HWC.reshape(8, 8, 8, 8, 3).mean((1, 3))


# -- the same everywhere --------------------------------------------------------------------------


def test_fresh_processes_and_hash_seeds_agree() -> None:
    digests = set()
    for seed in ("1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_the_world_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from foveate.world import World; World(size=16).sample(0).frames_THWC;"
        "print(sorted({'torch', 'transformers', 'av', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_order_of_access_does_not_matter() -> None:
    forward, backward = World(1, "train", size=32), World(1, "train", size=32)
    first = [forward.sample(index) for index in range(6)]
    last = [backward.sample(index) for index in reversed(range(6))][::-1]
    for one, other in zip(first, last, strict=True):
        assert words_of(one) == words_of(other)
        np.testing.assert_array_equal(one.frames_THWC, other.frames_THWC)
        np.testing.assert_array_equal(one.masks_THW, other.masks_THW)


def test_iteration_counts_from_zero() -> None:
    world = World(size=16)
    taken = list(itertools.islice(world, 3))
    assert [sample.name for sample in taken] == ["0/test/0", "0/test/1", "0/test/2"]
    assert [words_of(sample) for sample in taken] == [words_of(world.sample(i)) for i in range(3)]


def test_samples_splits_and_seeds_differ() -> None:
    scenes = [
        World(seed, split, size=16).sample(index).scene
        for seed in (0, 1)
        for split in SPLITS
        for index in (0, 1)
    ]
    # Names differ anyway: compare what happens.
    assert len({digest(scene.sprites, scene.shots) for scene in scenes}) == len(scenes)


def test_resolution_changes_nothing_but_pixels() -> None:
    small, large = (World(size=size).sample(4) for size in (16, (90, 64)))
    assert words_of(small) == words_of(large)


def test_a_choice_of_tasks_does_not_change_their_questions() -> None:
    for index in range(20):
        scene = sample_scene(f"tasks/{index}", 16)
        everything = questions_of(scene)
        for task in TASKS:
            asked = tuple(question for question in everything if question.task == task)
            assert questions_of(scene, tasks=(task,)) == asked


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=8), st.integers(-9, 9), st.integers(0, 9))
def test_draws_stay_in_range(name: str, low: int, span: int) -> None:
    draw = Draw(name)
    assert all(low <= draw.integer(low, low + span) <= low + span for _ in range(20))
    assert sorted(draw.shuffled(range(span))) == list(range(span))
    assert draw.choice("abc") in "abc"
    assert draw.weighted({"never": 0.0, "always": 1.0}) == "always"


# -- the same forever -----------------------------------------------------------------------------


def test_worlds_are_what_they_were() -> None:
    """Models are trained on this world: scenes, questions and captions must never change.

    Pixels may move by a little with the resampling of another Pillow, and masks not at all.
    """
    frozen = json.loads((GOLDENS / "frozen.json").read_text())
    assert len(frozen) >= 6
    for entry in frozen:
        sample = World(**entry["world"]).sample(entry["index"])
        assert words_of(sample) == entry["words"], entry["world"]
        assert sample.truth.areas_TK.tolist() == entry["areas"]
        for frame, levels in entry["cells"].items():
            np.testing.assert_allclose(cells(sample.frames_THWC[int(frame)]), levels, atol=4)


# -- any size -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, (16, 48), (224, 398), (61, 37)])
def test_any_resolution_and_aspect(size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    sample = World(size=size, frames=5).sample(2)
    assert sample.frames_THWC.shape == (5, height, width, 3)
    assert sample.frames_THWC.dtype == sample.masks_THW.dtype == np.uint8
    assert sample.masks_THW.shape == (5, height, width)
    assert sample.masks_THW.max() <= len(sample.scene.sprites)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(4, 20),
    st.tuples(st.integers(16, 48), st.integers(16, 48)),
    st.data(),
)
def test_some_frames_of_a_scene_are_those_of_all(
    index: int, frames: int, size: tuple[int, int], data: st.DataObject
) -> None:
    scene = sample_scene(f"subset/{index}", frames)
    wanted = sorted(data.draw(st.sets(st.integers(0, frames - 1), min_size=1)))
    pixels_THWC, masks_THW = render(scene, *size)
    some_THWC, some_THW = render(scene, *size, frames=wanted)
    np.testing.assert_array_equal(some_THWC, pixels_THWC[wanted])
    np.testing.assert_array_equal(some_THW, masks_THW[wanted])


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev'; choose one of train, val, test"),
        ({"fps": 0}, "fps must be positive, got 0"),
        ({"fps": float("nan")}, "fps must be positive, got nan"),
        ({"size": 15}, "at least 16 pixels"),
        ({"size": (64, 8)}, "at least 16 pixels"),
        ({"size": (64, 64, 3)}, "one side or"),
        ({"frames": 3}, "at least 4 frames, got 3"),
        ({"frames": 8.5}, "whole number of frames, got 8.5"),
        ({"tasks": ("what", "why")}, "unknown task 'why'; choose from what, where"),
        ({"tasks": "what"}, "tasks=\\('what',\\)"),
        ({"tasks": ()}, "at least one task"),
        ({"per_task": 0}, "per_task must be at least 1, got 0"),
        ({"natural": 1.5}, "natural is a fraction in \\[0, 1\\], got 1.5"),
        ({"noise": 9}, "noise must be 0 to 8 levels, got 9"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World(**arguments)


def test_bad_numbers_of_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="numbered from 0, got -1"):
        World(size=16).sample(-1)
    with pytest.raises(ValueError, match="by a whole number"):
        World(size=16).sample(1.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("frames", [[3, 3], [4, 2], [-1], [8], []])
def test_bad_frames_are_refused(frames: list[int]) -> None:
    with pytest.raises(ValueError, match="frames"):
        render(sample_scene("a", 8), 16, 16, frames=frames)


def test_numpy_numbers_are_numbers() -> None:
    sample = World(size=np.int64(24), frames=6).sample(np.int64(3))  # pyright: ignore
    assert sample.name == "0/test/3" and sample.frames_THWC.shape == (6, 24, 24, 3)
