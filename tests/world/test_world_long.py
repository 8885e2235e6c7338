"""Long clips: deterministic, drawn in pieces, and silent about their answers but at the event."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from foveate.video import Clip
from foveate.world.long import DENSE_TASKS, NEEDLE_TASKS, LongClip, LongWorld
from foveate.world.long_files import export_long, write_clip, write_one
from foveate.world.long_scenes import LONG_TASKS
from foveate.world.scene import Sprite
from foveate.world.vocabulary import COLORS, DIGITS, SHAPES, WORDS

ALL = tuple(LONG_TASKS)


def sprites(clip: LongClip) -> list[tuple[int, Sprite, bool]]:
    """Everything in a clip: first frame of its scene, the sprite, whether it is an event's."""
    found = []
    for number, plan in enumerate(clip._plans):
        scene, asked = clip._scene(number)
        about = {identity for question in asked.values() for identity in question.about}
        found += [(plan.first, one, one.id in about) for one in scene.sprites]
    return found


# -- the same everywhere --------------------------------------------------------------------------


def test_clips_are_frozen() -> None:
    told = []
    for seconds, fps, tasks, events in ((60, 8, ALL, 3), (20, 30, DENSE_TASKS, 1)):
        world = LongWorld(seconds, fps=fps, tasks=tasks, events=events)
        for index in range(6):
            clip = world.sample(index)
            told.append([clip.name, clip.windows, clip.events, sprites(clip)])
    assert hashlib.sha256(repr(told).encode()).hexdigest()[:16] == "33783530c725f46e"


def test_numbers_splits_and_seeds_give_other_clips() -> None:
    kinds = itertools.product((0, 1), ("train", "test"), (0, 1))
    drawn = [LongWorld(20, seed, split).sample(index) for seed, split, index in kinds]
    assert len({clip.name for clip in drawn}) == 8
    assert len({clip.render(0, 0).tobytes() for clip in drawn}) == 8


def test_pieces_are_the_whole() -> None:
    clip = LongWorld(40, fps=5).sample(3)
    whole = np.concatenate(list(clip.chunks(32)))
    assert whole.shape == (200, 32, 32, 3) and len(clip._plans) > 2
    np.testing.assert_array_equal(np.concatenate(list(clip.chunks(32, frames=7))), whole)
    np.testing.assert_array_equal(clip.render(61, 133, 32), whole[61:134])


def test_an_hour_is_drawn_where_one_looks() -> None:
    clip = LongWorld(3600, fps=30).sample(0)
    assert clip.frames == 108_000
    assert clip.render(107_990, 107_999).shape == (10, 64, 64, 3)


# -- what is asked --------------------------------------------------------------------------------


def test_events_lie_inside_one_scene_each_and_apart() -> None:
    for clip in itertools.islice(LongWorld(30, tasks=ALL, events=3), 60):
        starts = [plan.first for plan in clip._plans]
        for (_, last), (then, _) in itertools.pairwise(clip.windows):
            assert last < then
        for event in clip.events:
            assert event.first >= 0 and event.last < clip.frames
            assert not any(event.first < cut <= event.last for cut in starts)
            assert (event.start, event.stop) == (event.first / 8, (event.last + 1) / 8)
            assert event.question.answer in event.question.options


def test_any_depth_is_as_likely_as_any_other() -> None:
    for events in (1, 3):
        world = LongWorld(120, events=events)
        depth = [
            (first - 4) / (world.frames - world.event_frames - 8)
            for clip in itertools.islice(world, 600)
            for first, _ in clip.windows
        ]
        counts, _ = np.histogram(depth, bins=8, range=(0, 1))
        assert counts.sum() == 600 * events
        expected = len(depth) / 8
        assert ((counts - expected) ** 2 / expected).sum() < 24.3, counts  # 0.1 % of chi^2(7)


def test_nothing_outside_of_an_event_is_what_its_question_names() -> None:
    for clip in itertools.islice(LongWorld(60, tasks=ALL, events=3), 80):
        own = {name for names in clip.names for name in names}
        for _, one, of_event in sprites(clip):
            if not of_event and one.kind != "speck":
                assert getattr(one, clip.naming) not in own
                assert one.kind != "sign"
        for event, names in zip(clip.events, clip.names, strict=True):
            assert all(name in event.question.text for name in names)


def test_things_of_events_are_there_during_them_alone() -> None:
    for clip in itertools.islice(LongWorld(40, fps=30, tasks=ALL, event_seconds=0.6), 60):
        (event,) = clip.events
        frames = [
            range(start + one.first, start + one.last + 1)
            for start, one, of_event in sprites(clip)
            if of_event
        ]
        assert frames and all(event.first <= r[0] and r[-1] <= event.last for r in frames)
        if event.question.task != "order":
            assert all((r[0], r[-1]) == (event.first, event.last) for r in frames)


def test_a_fast_mover_crosses_the_middle_during_its_event() -> None:
    world = LongWorld(10, fps=30, tasks=("direction",), event_seconds=16 / 30)
    for clip in itertools.islice(world, 40):
        (event,) = clip.events
        number = next(n for n, plan in enumerate(clip._plans) if plan.events)
        scene, _ = clip._scene(number)
        mover = scene.sprites[event.question.about[0] - 1]
        start, end = (np.array(mover.center(f, scene.frames)) for f in (mover.first, mover.last))
        step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
        np.testing.assert_allclose(
            end - start, 0.46 * np.array(step[event.question.answer]), atol=1e-9
        )
        assert (np.abs((start + end) / 2 - 0.5) < 0.36).all()


# -- nothing outside gives the answer away --------------------------------------------------------


def shown_outside(clip: LongClip, attribute: str) -> set[str]:
    return {
        getattr(one, attribute)
        for _, one, of_event in sprites(clip)
        if not of_event and one.kind == "shape"
    }


def test_answers_are_balanced_and_the_rest_of_a_clip_does_not_tell_them() -> None:
    """Guess "what" from all that the rest shows: among it, or among what it never shows."""
    world, asked = LongWorld(60, tasks=ALL), defaultdict(list)
    for clip in itertools.islice(world, 1800):
        asked[clip.tasks[0]].append((clip, clip.events[0].question))
    for task, pairs in asked.items():
        counts: dict[str, Counter[int]] = defaultdict(Counter)
        for _, question in pairs:
            kind = question.text.split()[1] if task in ("what", "reading") else task
            counts[kind][question.options.index(question.answer)] += 1
        for kind, found in counts.items():
            options = {"shape": 8, "color": 8, "word": 12, "number": 10, "where": 9, "count": 5}
            number = options.get(kind, 4 if kind == "direction" else 2)
            expected = found.total() / number
            spread = sum((found[place] - expected) ** 2 / expected for place in range(number))
            assert spread < number - 1 + 5 * (2 * (number - 1)) ** 0.5, (kind, found)
    for guess_shown in (True, False):
        gains = []
        for clip, question in asked["what"]:
            shown = shown_outside(clip, "color" if clip.naming == "shape" else "shape")
            left = [o for o in question.options if (o in shown) == guess_shown] or question.options
            gains.append((question.answer in left) / len(left))
        margin = 3 * np.std(gains) / len(gains) ** 0.5
        assert abs(np.mean(gains) - 1 / 8) < margin, np.mean(gains)


def test_the_rest_of_a_clip_is_the_same_whatever_the_answer() -> None:
    """Draw the event anew: not one pixel outside of it changes."""
    for task in ALL:
        clip = LongWorld(12, fps=8, tasks=(task,)).sample(1)
        frames = np.concatenate(list(clip.chunks(48)))
        bare = np.concatenate(list(without_events(clip).chunks(48)))
        differs = (frames != bare).any((1, 2, 3))
        ((first, last),) = clip.windows
        assert differs[first : last + 1].any(), task
        assert not differs[:first].any() and not differs[last + 1 :].any(), task


def without_events(clip: LongClip) -> LongClip:
    class Bare(LongClip):
        def _scene(self, number: int):
            scene, asked = clip._scene(number)
            about = {identity for question in asked.values() for identity in question.about}
            rest = tuple(one for one in scene.sprites if one.id not in about)
            return scene.__class__(scene.name, scene.frames, rest, scene.shots, scene.noise), {}

    values = {name: getattr(clip, name) for name in clip.__dataclass_fields__}
    return Bare(**values)


# -- files ----------------------------------------------------------------------------------------


def test_a_file_holds_the_clip(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = LongWorld(9, fps=6).sample(0)
    told = []
    write_clip(clip, tmp_path / "a.mp4", progress=lambda done, total: told.append((done, total)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert told[-1] == (54, 54)
    opened = Clip(tmp_path / "a.mp4")
    assert (len(opened), opened.info.width, opened.info.duration) == (54, 128, 9.0)
    decoded = opened.take(range(54)).pixels.permute(0, 2, 3, 1).numpy().astype(float)
    drawn = clip.render(0, 53).repeat(2, axis=1).repeat(2, axis=2)
    assert np.abs(decoded - drawn).mean() < 4


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_oblong_files(tmp_path: Path, fit: str) -> None:
    pytest.importorskip("av")
    clip = LongWorld(6, fps=4).sample(2)
    write_clip(clip, tmp_path / "a.mkv", size=(96, 160), fit=fit, codec="mpeg4")  # type: ignore[arg-type]
    frame = Clip(tmp_path / "a.mkv").take([5]).pixels[0].permute(1, 2, 0).numpy().astype(float)
    assert frame.shape == (96, 160, 3)
    left, right = (0, 160) if fit == "stretch" else (32, 128)
    rows, columns = np.arange(96) * 64 // 96, np.arange(right - left) * 64 // (right - left)
    drawn = clip.render(5, 5)[0][rows][:, columns]
    assert np.abs(frame[:, left:right] - drawn).mean() < 8
    assert frame[:, :left].mean() < 8 if left else True


def test_a_file_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_clip(LongWorld(20).sample(0), tmp_path / "a.mp4", progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_clips_can_be_asked_about(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from foveate.bench import FolderSuite

    world = LongWorld(10, events=2)
    done = export_long((world.sample(index) for index in range(2)), tmp_path / "out", size=64)
    assert (done["clips"], done["questions"], done["seconds"]) == (2, 4, 20)
    assert done["tasks"] == {"what": 2, "where": 1, "reading": 1}
    items = list(FolderSuite(tmp_path / "out"))
    asked = [event.question for index in range(2) for event in world.sample(index).events]
    assert [(i.question, i.answer) for i in items] == [(q.text, q.answer) for q in asked]
    with pytest.raises(FileExistsError, match="not empty"):
        export_long([world.sample(0)], tmp_path / "out")
    with pytest.raises(ValueError, match="no clips"):
        export_long([], tmp_path / "none")


def test_one_file_never_replaces_another(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = LongWorld(5).sample(0)
    done = write_one(clip, tmp_path / "a.mp4", size=64)
    assert done["questions_file"] == str(tmp_path / "a.jsonl")
    with pytest.raises(FileExistsError, match=r"a\.mp4"):
        write_one(clip, tmp_path / "a.mp4")


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seconds": 0}, "above 0"),
        ({"fps": 0}, "above 0"),
        ({"event_seconds": -1}, "above 0"),
        ({"split": "all"}, "unknown split"),
        ({"events": 4}, "1 to 3 events"),
        ({"noise": 9}, "0 to 8 levels"),
        ({"tasks": ()}, "tasks are some of"),
        ({"tasks": "what"}, "tasks are some of"),
        ({"tasks": ("when",)}, "tasks are some of"),
        ({"seconds": 2.5}, "do not fit"),
    ],
)
def test_bad_worlds_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongWorld(**({"seconds": 20} | values))


def test_bad_frames_and_numbers_are_refused() -> None:
    world = LongWorld(20)
    for index in (-1, 1.5):
        with pytest.raises(ValueError, match="numbered from 0"):
            world.sample(index)  # type: ignore[arg-type]
    for pair in ((-1, 3), (5, 4), (0, 160)):
        with pytest.raises(ValueError, match="frames go from 0 to 159"):
            world.sample(0).render(*pair)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 31}, "even"),
        ({"size": (360, 639)}, "even"),
        ({"drawn": 8}, "at least 16"),
        ({"fit": "crop"}, "stretch"),
        ({"codec": "theora"}, "codec must be one of"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_clip(LongWorld(5).sample(0), tmp_path / "a.mp4", **values)


def test_every_task_has_options_of_the_world() -> None:
    for clip in itertools.islice(LongWorld(20, tasks=ALL), 60):
        question = clip.events[0].question
        known = {*SHAPES, *COLORS, *DIGITS, *WORDS, "left", "right", "up", "down"}
        if question.task in ("what", "reading", "direction", "order", "count"):
            assert set(question.options) <= known
    assert set(NEEDLE_TASKS) | set(DENSE_TASKS) <= set(ALL)
