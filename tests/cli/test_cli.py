from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from foveate import __version__
from tiny import tiny_encoder

pytest.importorskip("typer")
VIEW_TESTS = Path(__file__).parents[1] / "view"
sys.path.insert(0, str(VIEW_TESTS))

from checkpoints import save_checkpoint  # noqa: E402

from foveate.cli.training_tasks import TASK_SUMMARIES  # noqa: E402

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    tiny_encoder("dinov2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of a square that moves, as an animated GIF turned into an MP4."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(16):
            picture = torch.full((64, 96, 3), 40, dtype=torch.uint8)
            picture[20:44, 4 * number : 4 * number + 24] = 210
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def one_error(err: str) -> str:
    """The one line on standard error; anything else fails."""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


# -- surface --------------------------------------------------------------------------------------


def options() -> dict[str, list[str]]:
    import typer.main

    from foveate.cli.app import app

    group = typer.main.get_group(app)
    commands = {"": group, **group.commands}
    for name, command in group.commands.items():
        for inner, part in getattr(command, "commands", {}).items():
            commands[f"{name} {inner}"] = part
    return {
        name: sorted(
            flag
            for parameter in command.params
            for flag in [*parameter.opts, *parameter.secondary_opts]
        )
        for name, command in commands.items()
    }


def test_the_options_are_frozen() -> None:
    # Users' scripts hold on to these; take one away only with a deprecation.
    assert options() == {
        "": ["--version"],
        "list": ["--json", "--kind", "--stage", "pattern"],
        "show": [
            *("--device", "--encoder", "--frames", "--json", "--no-pool", "--out", "--pool"),
            *("--recipe", "--retain", "--sample", "--seed", "--size", "--tokens"),
            *("-o", "-r", "video"),
        ],
        "ask": [
            *("--chunk", "--companion", "--compare", "--device", "--dtype", "--frames"),
            *("--isolate", "--json", "--max-new-tokens", "--model", "--no-overlap", "--out"),
            *("--overlap", "--parts", "--recipe", "--retain", "--scorer", "--tokens"),
            *("-m", "-o", "-r", "question", "video"),
        ],
        "bench": [
            *("--batch", "--clips", "--device", "--dtype", "--frames", "--json"),
            *("--max-new-tokens", "--minutes", "--model", "--out", "--recipes", "--repeats"),
            *("--retain", "--retry-failed", "--seed", "--suite", "--tasks", "-m", "-o", "-r"),
        ],
        "train": [],
        "train embedded": [
            *("--clips", "--device", "--json", "--out", "--resume", "--seed", "--size"),
            *("--threads", "--workers", "-o"),
        ],
        "train measure": ["--device", "--json", "--threads", "folder"],
        **{
            f"train {task}": [
                *("--device", "--json", "--out", "--resume", "--seed", "--size", "--threads"),
                *("--workers", "-o"),
            ]
            for task in TASK_SUMMARIES
        },
        "tune": [
            *("--batch", "--device", "--dtype", "--frames", "--json", "--model", "--optimiser"),
            *("--out", "--random", "--retain", "--samples", "--seed", "--suite", "--trials"),
            *("-m", "-o", "recipe"),
        ],
        "watch": [
            *("--answers", "--behind", "--capacity", "--device", "--dtype", "--every", "--format"),
            *("--fps", "--growing", "--json", "--max-new-tokens", "--model", "--recipe"),
            *("--retain", "--timeout", "--tokens", "-m", "-r", "question", "source"),
        ],
        "world": [
            *("--clips", "--events", "--first", "--format", "--fps", "--frames", "--json"),
            *("--letterbox", "--masks", "--minutes", "--natural", "--seed", "--size"),
            *("--split", "--tasks", "folder"),
        ],
    }


@pytest.mark.parametrize(
    "command",
    ["", "list", "show", "ask", "train", "train embedded", "train shapes", "train measure"],
)
def test_help_explains_every_option(run: Run, command: str) -> None:
    code, out, err = run(*command.split(), "--help")
    assert code == 0 and not err and "Usage: foveate" in out
    for flag in options()[command]:
        assert flag in out


def test_version_comes_from_the_package(run: Run) -> None:
    assert run("--version") == (0, f"foveate {__version__}\n", "")


def test_usage_errors_exit_with_two(run: Run) -> None:
    for arguments in (["nonsense"], ["show", "--bogus"], ["show", "x.mp4", "--frames", "0"]):
        code, out, err = run(*arguments)
        assert code == 2 and not out and "Error" in err, arguments


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "foveate", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"foveate {__version__}\n", "")


def test_help_needs_no_torch() -> None:
    script = (
        "import sys\nfrom foveate.cli import main\nassert main(['show', '--help']) == 0\n"
        "print(sorted({'torch', 'transformers', 'PIL', 'av'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    script = (
        "import sys\n"
        "sys.modules['typer'] = None\n"
        "from foveate.cli import main\n"
        "sys.exit(main(['list']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        'error: the foveate command needs typer and rich: pip install "foveate[cli]"\n'
    )


# -- list -----------------------------------------------------------------------------------------


def test_list_shows_every_method(run: Run) -> None:
    from foveate import list_methods

    code, out, err = run("list")
    assert code == 0 and not err
    for name in list_methods():
        assert name in out


def test_list_filters_by_name_stage_and_kind(run: Run) -> None:
    def names(*arguments: str) -> set[str]:
        code, out, _ = run("list", *arguments, "--json")
        assert code == 0
        return {card["name"] for card in json.loads(out)}

    assert "holitom" in names("--stage", "projector") and "tome" not in names(
        "--stage", "projector"
    )
    assert names("--kind", "baseline") >= {"random", "uniform", "pool"}
    assert names("holi*") == {"holitom"}
    assert names("--stage", "cache", "--kind", "baseline") == set()
    assert names("nothing") == set()


def test_list_as_json_holds_the_cards(run: Run) -> None:
    card = json.loads(run("list", "holitom", "--json")[1])[0]
    assert card["arxiv"] == "2505.21334" and card["stages"] == ["projector", "decoder"]
    assert card["retain"] == 0.15 and card["headline"]


def test_list_survives_a_broken_plug_in(run: Run) -> None:
    from foveate.core import registry

    registry._methods["broken_one"] = "no_such_package:Method"
    try:
        code, out, err = run("list")
    finally:
        del registry._methods["broken_one"]
    assert code == 0 and "holitom" in out and "warning: broken_one cannot be loaded" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "middle"], "unknown stage 'middle'; stages are frames, patches"),
        (["--kind", "magic"], "unknown kind 'magic'; kinds are training-free, trained, baseline"),
    ],
)
def test_list_refuses_unknown_filters(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run("list", *arguments)
    assert code == 2 and not out and message in one_error(err)


# -- show -----------------------------------------------------------------------------------------


def test_show_prints_the_stages_and_writes_the_picture(
    run: Run, video: Path, encoder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "kept.html"
    code, out, err = run(
        "show", video, "--retain", "0.3", "--encoder", encoder, "--frames", "6", "--out", target
    )
    assert code == 0 and not err, err
    rows = [line.split() for line in out.splitlines()]
    assert ["projector", "holitom"] in [row[:2] for row in rows]
    assert ["decoder", "holitom", "not", "run"] in rows
    for part in ("compute, encoder", "prefill (reference 7B LLM)", "time, decode", "segments"):
        assert part in out
    assert f"wrote {target}" in " ".join(out.split())
    html = target.read_text()
    assert "clip.mp4: what holitom kept" in html and html.count('class="view"') == 6


def test_show_as_json_is_one_document_and_writes_nothing(
    run: Run, video: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        "show",
        video,
        "--tokens",
        "9",
        "--recipe",
        "divprune",
        "--encoder",
        encoder,
        "--frames",
        "4",
        "--no-pool",
        "--json",
    )
    document = json.loads(out)
    assert code == 0 and not err and not list(tmp_path.iterdir())
    assert (document["visual_before"], document["visual_after"]) == (4 * 36, 9)
    assert document["html"] is None and document["video"] == str(video)
    assert set(document["seconds"]) == {"decode", "encode", "reduce"}


def test_show_writes_kept_html_when_nothing_is_said(
    run: Run, video: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "tome(retain=0.5)@encoder + divprune"
    code, out, _ = run("show", video, "-r", recipe, "--encoder", encoder, "--frames", "2")
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["kept.html"]
    assert "encoder" in out and "tome" in out


def test_show_takes_a_picture(run: Run, encoder: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(photo)
    code, out, _ = run("show", photo, "-r", "uniform", "--encoder", encoder, "--json")
    assert code == 0 and json.loads(out)["items"][0]["modality"] == "image"


def test_show_takes_several_pictures(run: Run, encoder: Path, tmp_path: Path, video: Path) -> None:
    photos = [tmp_path / name for name in ("one.png", "two.jpg")]
    for photo in photos:
        Image.new("RGB", (60, 40), (200, 30, 30)).save(photo)
    common = ("-r", "tome", "--retain", "0.5", "--encoder", encoder)
    target = tmp_path / "kept.html"
    code, out, err = run("show", *photos, *common, "--out", target)
    assert code == 0 and not err
    assert "2 pictures" in out and "tokens by block" in out and "frame" not in out
    html = target.read_text()
    assert "2 pictures: what tome kept" in html and html.count('class="view"') == 2
    document = json.loads(run("show", *photos, *common, "--json")[1])
    assert document["video"] == [str(photo) for photo in photos]
    assert [item["name"] for item in document["items"]] == ["one.png", "two.jpg"]
    code, out, err = run("show", photos[0], video, *common, "--json")
    assert code == 2 and not out and "show one video at a time" in one_error(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retain", "1.5"], "must lie in (0, 1], got 1.5"),
        (["--retain", "0.5", "--tokens", "3"], "Give retain or tokens, not both"),
        (["--recipe", "holitomm"], "Did you mean holitom"),
        (["--recipe", "fastv"], "needs a language model"),
        (["--recipe", "dtop"], "pass weights='heads.safetensors'"),
        (["--recipe", "tovim"], "runs on VisionMamba"),
        (["--recipe", "holitom(tau=7)"], "tau"),
        (["--size", "50"], "no multiple of the encoder's patches of 8 pixels; try 48"),
        (["--out", "missing/kept.html"], "the directory missing does not exist"),
        (["--encoder", "./missing"], "no such folder"),
        (["--device", "abacus"], "the device 'abacus' cannot be used here"),
        (["--sample", "bikes"], "one of the two"),
    ],
)
def test_show_explains_bad_input_in_one_line(
    run: Run, video: Path, encoder: Path, arguments: list[str], message: str
) -> None:
    named = [] if "--encoder" in arguments else ["--encoder", encoder]
    code, out, err = run("show", video, "--frames", "2", "--json", *named, *arguments)
    assert code == 2 and not out and message in one_error(err)


def test_show_explains_bad_files_in_one_line(
    run: Run, video: Path, encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video at all")
    (tmp_path / "text.png").write_text("this is no picture either")
    (tmp_path / "film.png").write_bytes(video.read_bytes())
    for name, message in (
        ("missing.mp4", "no such file"),
        ("empty.mp4", "the file is empty"),
        ("text.mp4", "not a video"),
        ("missing.png", "no such file"),
        ("text.png", "cannot read the picture"),
        ("film.png", "cannot read the picture"),
    ):
        code, out, err = run("show", tmp_path / name, "--encoder", encoder, "--json")
        assert code == 2 and not out and message in one_error(err)
    assert "one of the two" in one_error(run("show")[2])


def test_debugging_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown stage"):
        run("list", "--stage", "middle")


def test_interrupting_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foveate.cli.cards.cards", interrupted)
    code, out, err = run("list")
    assert (code, out, err) == (130, "", "interrupted\n")


def test_the_demo_runs_on_the_embedded_encoder(run: Run, tmp_path: Path) -> None:
    # The main job: a real clip through a real encoder and HoliTom.
    from foveate.errors import MissingDependencyError
    from foveate.models.default_encoder import default_encoder_path
    from foveate.video import sample_clip

    try:
        sample_clip("carphone")
        default_encoder_path()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    target = tmp_path / "kept.html"
    code, out, err = run(
        "show",
        "--sample",
        "carphone",
        "--retain",
        "0.15",
        "--frames",
        "4",
        "--size",
        "112",
        "--out",
        target,
        "--json",
    )
    document = json.loads(out)
    assert code == 0 and not err
    assert document["visual_before"] == 4 * 16 and document["visual_after"] < 20
    assert document["segments"] and target.stat().st_size < 500_000


# -- ask ------------------------------------------------------------------------------------------


def test_ask_streams_the_answer_and_prints_what_it_took(
    run: Run, video: Path, model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "answer.html"
    code, out, err = run(
        "ask",
        video,
        "what is in the video",
        "--model",
        model,
        "--retain",
        "0.3",
        "--frames",
        "6",
        "--max-new-tokens",
        "4",
        "--compare",
        "--out",
        target,
    )
    assert code == 0 and not err, err
    for part in (
        "untouched:",
        "holitom:",
        "projector",
        "decoder",
        "into the language model",
        "time to first token",
        "tokens per second",
        "peak memory",
    ):
        assert part in out
    assert out.count("GiB") == 2
    assert "clip.mp4: what is in the video" in target.read_text()


def test_ask_as_json_is_one_document(run: Run, video: Path, model: Path) -> None:
    code, out, err = run(
        "ask",
        video,
        "what is in the video",
        "-m",
        model,
        "-r",
        "divprune",
        "--retain",
        "0.5",
        "--frames",
        "4",
        "--max-new-tokens",
        "3",
        "--compare",
        "--json",
    )
    document = json.loads(out)
    assert code == 0 and not err
    assert document["new_tokens"] == document["untouched"]["new_tokens"] == 3
    assert document["report"]["visual_before"] == 4 * 9 + 1
    assert document["report"]["visual_after"] < document["report"]["visual_before"]
    assert len(document["answer"].split()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./missing"], "no such folder"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--retain", "0"], "must lie in (0, 1], got 0"),
        (["--recipe", "nothing"], "No method is named 'nothing'"),
        (["--out", "missing/x.html"], "does not exist"),
    ],
)
def test_ask_explains_bad_input_in_one_line(
    run: Run, video: Path, model: Path, arguments: list[str], message: str
) -> None:
    named = [] if "--model" in arguments else ["--model", model]
    code, out, err = run("ask", video, "what", *named, "--frames", "2", "--json", *arguments)
    assert code == 2 and not out and message in one_error(err)


def test_nothing_reaches_standard_error_in_a_real_process(
    video: Path, model: Path, tmp_path: Path
) -> None:
    # Progress bars and log lines of transformers would break `2>&1 | jq`.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "foveate",
            "ask",
            str(video),
            "what is in the video",
            "--model",
            str(model),
            "--frames",
            "2",
            "--max-new-tokens",
            "2",
            "--json",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 2


def test_the_extra_is_not_needed_by_the_library() -> None:
    # The functions behind the commands belong to the library, not to the command line.
    assert importlib.util.find_spec("foveate.view.show") is not None
    script = (
        "import sys\nsys.modules['typer'] = sys.modules['rich'] = None\n"
        "import foveate.view\nfoveate.view.show_video, foveate.view.ask\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
