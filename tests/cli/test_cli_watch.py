"""`foveate watch`: the same question again and again while a source goes on."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")
av = pytest.importorskip("av")
sys.path.insert(0, str(Path(__file__).parents[1] / "view"))

from checkpoints import save_checkpoint  # noqa: E402

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven seconds."""
    path = tmp_path_factory.mktemp("clip") / "clip.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(175):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([number]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def options(model: Path) -> list[object]:
    return ["--model", model, "--max-new-tokens", 3, "--device", "cpu"]


def test_answers_while_it_goes_on(run: Run, video: Path, model: Path) -> None:
    code, out, err = run("watch", video, "what is it", "--every", 2, *options(model))
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["0:00:02", "0:00:04", "0:00:06"]
    assert "7 frames of 175 decoded, the file ends here" in err


def test_a_line_of_json_per_answer(run: Run, video: Path, model: Path) -> None:
    arguments = ["--json", "--every", 5, "--fps", 2, "--capacity", 3]
    code, out, err = run("watch", video, "what", *arguments, *options(model))
    assert (code, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    # When it is due, and at the end.
    assert [answer["seconds"] for answer in answers] == pytest.approx([5.0, 6.5], abs=0.05)
    assert answers[1]["frames"] == pytest.approx([5.5, 6.0, 6.5], abs=0.05)
    assert sum(answers[0]["evidence"]) == pytest.approx(1, abs=1e-4)
    arguments = ["--json", "--every", 1, "--answers", 2, "--recipe", "videoscan(capacity=3)"]
    code, out, err = run("watch", video, "what", *arguments, *options(model))
    assert (code, len(out.splitlines())) == (0, 2)


@pytest.mark.skipif(os.name != "posix", reason="named pipes are of POSIX systems")
def test_a_pipe(run: Run, video: Path, model: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(video.read_bytes()), daemon=True)
    writer.start()
    code, out, err = run("watch", pipe, "what", "--every", 60, *options(model))
    assert code == 0, err
    assert len(out.splitlines()) == 1
    assert "the source ended" in err
    writer.join(30)
    assert not writer.is_alive()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.ts", "what"], "no such file"),
        (["concat:a|b", "what"], "not allowed"),
        ([".", "what"], "directory"),
        (["CLIP", "what", "--every", "0"], "--every must be above 0"),
        (["CLIP", "what", "--fps", "0"], "fps must be a positive number"),
        (["CLIP", "what", "--behind", "run"], "behind must be"),
        (["CLIP", "what", "--dtype", "int3"], "unknown dtype"),
        (["CLIP", "what", "--recipe", "fastv"], "cannot shorten the frames of a stream"),
    ],
)
def test_what_makes_no_sense(
    run: Run, video: Path, model: Path, arguments: list[str], words: str
) -> None:
    given = [video if argument == "CLIP" else argument for argument in arguments]
    code, out, err = run("watch", *given, *options(model))
    assert code == 2
    assert err.startswith("error: ")
    assert words in err
    assert not out


def test_help(run: Run) -> None:
    code, out, err = run("watch", "--help")
    assert (code, err) == (0, "")
    for option in ("--every", "--growing", "--behind", "--timeout", "--capacity", "--answers"):
        assert option in out
