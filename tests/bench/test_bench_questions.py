from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foveate.bench import FolderSuite, Item, Suite, WorldSuite, open_suite
from foveate.checkpoints import frame_side
from foveate.checkpoints.processors import NoVideo, StackedFrames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "b.mp4").write_bytes(b"x")
    return tmp_path


def write(folder: Path, *lines: str | bytes | dict, name: str = "questions.jsonl") -> Path:
    raw = [json.dumps(x) if isinstance(x, dict) else x for x in lines]
    data = b"\n".join(x if isinstance(x, bytes) else x.encode() for x in raw)
    (folder / name).write_bytes(data)
    return folder / name


def good(**changes: object) -> dict:
    return {"video": "a.mp4", "question": "What is it?", "answer": "dog", **changes}


def test_questions_are_read(folder: Path) -> None:
    choice = good(
        video="clips/b.mp4", options=["A. cat", "B. Dog"], answer="dog", task="what", id=7
    )
    write(folder, good(), choice)
    suite = FolderSuite(folder)
    first, second = suite
    assert (first.id, first.task, first.options) == ("questions.jsonl:1", "all", ())
    assert (second.id, second.task, second.clip_id) == ("7", "what", "clips/b.mp4")
    assert second.options == ("cat", "Dog") and second.answer == "Dog"
    assert second.video == folder / "clips" / "b.mp4" and second.where == "questions.jsonl:2"
    assert suite.errors == [] and suite.lettered and suite.name == "questions"


BAD = {
    "not JSON": '{"video": ',
    "not UTF-8 text (byte 12 of the line)": b'{"video": "\xff\xfe"}',
    "must be a JSON object, got a list": "[1, 2]",
    "must be a JSON object, got a number": "3",
    "lacks question, answer": '{"video": "a.mp4"}',
    "lacks answer": good(answer=None),
    "question must be text, got a number": good(question=3),
    "question is empty": good(question="  "),
    "answer must be text or a number, got true or false": good(answer=True),
    "video must be text, got a list": good(video=["a.mp4"]),
    "the video c.mp4 does not exist": good(video="c.mp4"),
    "the video clips is a folder": good(video="clips"),
    "download it": good(video="https://example.org/a.mp4"),
    "options must be a list of texts, got text": good(options="dog"),
    "an option must be text or a number, got an object": good(options=["dog", {}]),
    "options must be 2 to 26, got 1": good(options=["dog"]),
    "two options are the same": good(options=["dog", "The dog"]),
    "the answer 'dog' is not among the options cat, cow": good(options=["cat", "cow"]),
    "the answer 'C' is not among": good(options=["cat", "cow"], answer="C"),
    "id must be text or a number, got a list": good(id=[1]),
    "task must be text, got a number": good(task=1),
    "the id '1' was taken by line 1": good(id="1"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_is_reported_and_passed_over(folder: Path, reason: str) -> None:
    write(folder, good(id=1), BAD[reason], good(id=2))
    suite = FolderSuite(folder)
    assert [item.id for item in suite] == ["1", "2"]
    (error,) = suite.errors
    assert error.startswith("questions.jsonl:2: ") and reason in error


def test_all_bad_lines_are_an_error(folder: Path) -> None:
    write(folder, *(BAD[reason] for reason in BAD if reason != "the id '1' was taken by line 1"))
    with pytest.raises(ValueError, match=r"no usable line: questions.jsonl:1: .*and 16 more"):
        FolderSuite(folder)
    write(folder, "", " ")
    with pytest.raises(ValueError, match="is empty: write one JSON object per line"):
        FolderSuite(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_other_systems_are_read(folder: Path, encoding: str) -> None:
    text = "\r\n\r\n".join(
        json.dumps(good(question=q), ensure_ascii=False) for q in ("Gr\u00fcn?", "a\u2028b")
    )
    (folder / "questions.jsonl").write_bytes((text + "\r\n").encode(encoding))
    suite = FolderSuite(folder)
    assert [item.question for item in suite] == ["Gr\u00fcn?", "a\u2028b"]
    # Empty lines count, so that an editor shows the line that a message names.
    assert [item.where for item in suite] == ["questions.jsonl:1", "questions.jsonl:3"]


@pytest.mark.parametrize("answer", ["B", "(b)", "b.", "dog", "The Dog", "B. dog"])
def test_answers_name_an_option_by_letter_or_text(folder: Path, answer: str) -> None:
    write(folder, good(options=["cat", "dog"], answer=answer))
    assert [item.answer for item in FolderSuite(folder)] == ["dog"]


def test_numbers_are_texts(folder: Path) -> None:
    write(folder, good(options=[1, 2], answer=2))
    assert [(item.options, item.answer) for item in FolderSuite(folder)] == [(("1", "2"), "2")]


def test_spellings_of_a_path_are_one_clip(folder: Path) -> None:
    names = ["a.mp4", "./a.mp4", "clips/../a.mp4", str(folder / "a.mp4")]
    write(folder, *(good(video=name) for name in names))
    assert {item.clip_id for item in FolderSuite(folder)} == {"a.mp4"}


def test_the_file_of_a_folder_is_found(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"exactly one \.jsonl file; it holds none"):
        FolderSuite(folder)
    write(folder, good(), name="x.jsonl")
    assert FolderSuite(folder).name == "x"
    write(folder, good(), name="y.jsonl")
    with pytest.raises(ValueError, match=r"it holds x\.jsonl, y\.jsonl"):
        FolderSuite(folder)
    write(folder, good())
    assert FolderSuite(folder).name == "questions"
    assert FolderSuite(folder / "y.jsonl").name == "y"
    with pytest.raises(ValueError, match="no such file or folder"):
        open_suite(folder / "missing")


def test_tasks_and_clips_choose(folder: Path) -> None:
    write(folder, good(task="what"), good(task="where", video="clips/b.mp4"), good(task="what"))
    assert len(list(FolderSuite(folder, clips=1))) == 2
    assert [item.task for item in FolderSuite(folder, tasks=["where"])] == ["where"]
    with pytest.raises(ValueError, match="no task when; tasks are what, where"):
        FolderSuite(folder, tasks=["when"])
    with pytest.raises(ValueError, match="clips must be at least 1"):
        FolderSuite(folder, clips=0)


def test_the_world_asks_the_same_again() -> None:
    suite = open_suite("world", clips=3, tasks=["what", "where"], frames=4)
    assert isinstance(suite, WorldSuite) and not suite.lettered
    first, second = list(suite), list(suite)
    assert [(i.id, i.question, i.answer) for i in first] == [
        (i.id, i.question, i.answer) for i in second
    ]
    assert {item.task for item in first} <= {"what", "where"} and first
    assert all(item.video.shape[0] == 4 and item.answer in item.options for item in first)
    assert len({item.id for item in first}) == len(first)
    with pytest.raises(ValueError, match="no task flavour; tasks are what"):
        WorldSuite(1, ["flavour"])
    with pytest.raises(ValueError, match="clips must be at least 1"):
        WorldSuite(0)


def test_the_world_is_drawn_at_the_models_size() -> None:
    suite = WorldSuite(1, ["what"], frames=4)
    sizes = {side: next(iter(suite.sized_for(side))).video.shape for side in (None, 48, 64, 96)}
    assert sizes == {
        None: (4, 64, 64, 3),
        48: (4, 64, 64, 3),  # shapes could not be told apart
        64: (4, 64, 64, 3),
        96: (4, 96, 96, 3),
    }
    asked = [[(i.id, i.question, i.answer) for i in s] for s in (suite, suite.sized_for(96))]
    assert asked[0] == asked[1]
    assert suite.sized_for(96).args == {**suite.args, "size": 96}
    fixed = WorldSuite(1, size=80)
    assert fixed.sized_for(96) is fixed
    own = Suite("mine", [])
    assert own.sized_for(96) is own


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"size": {"height": 384, "width": 384}}, 384),
        ({"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}, 224),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, None),
        ({}, None),
    ],
)
def test_the_side_of_a_models_frames(settings: dict[str, Any], side: int | None) -> None:
    """As processors of transformers say it, and as those that stand in for them do."""
    theirs = SimpleNamespace(video_processor=SimpleNamespace(**settings))
    assert frame_side(theirs) == side
    steps = {"do_resize": True, "do_center_crop": "crop_size" in settings}
    if "longest_edge" not in settings.get("size", {}):
        ours = SimpleNamespace(video_processor=StackedFrames({**steps, **settings}))
        assert frame_side(ours) == side
    images = SimpleNamespace(video_processor=NoVideo("X"), image_processor=theirs.video_processor)
    assert frame_side(images) == side


def test_a_suite_of_ones_own() -> None:
    items = [Item("1", "c", Path("c.mp4"), "Why?", (), "because", "why")]
    assert list(Suite("mine", items)) == list(Suite("mine", lambda: iter(items))) == items
