"""The lmms-eval model: against the package where it is installed, else against a recording."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import recorded_lmms_eval
import torch
from PIL import Image

from foveate.attach import reduce
from foveate.bench import lmms_eval
from foveate.bench.lmms_eval import Answerer, Settings, cut_at, generation_arguments, read_recipe
from foveate.checkpoints import load_model, prepare_chats, read_chat
from foveate.core import Recipe
from foveate.errors import MissingDependencyError, RecipeError, VideoError
from foveate.video import Clip
from foveate.view import ask

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "view"))

from checkpoints import save_checkpoint  # noqa: E402

QWEN_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %} {{ c['text'] }}"
    "{% else %} <|vision_start|> <|{{ c['type'] }}_pad|> <|vision_end|>{% endif %}{% endfor %}"
    "{% endfor %} ASSISTANT:"
)
QUESTION = "what is in the video"
RECIPE = "tome(r=2;retain=0.8)@encoder + holitom(tau=0.65)"
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
with_package = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 5, 8), generator=generator).byte()
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(1, seed)[0].permute(1, 2, 0).numpy())


def messages(*shown: Any, text: str = QUESTION) -> list[dict[str, Any]]:
    kinds = ["image" if isinstance(item, Image.Image) else "video" for item in shown]
    content = [{"type": kind, "url": item} for kind, item in zip(kinds, shown, strict=True)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llava_onevision", tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five clips of 8, 8, 8, 8 and 3 frames at 4 frames per second, and one that is no video."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"{number}.mp4" for number in range(6)]
    for number, path in enumerate(paths[:5]):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 40, "yuv420p"
            for frame_CHW in pixels(8 if number < 4 else 3, number):
                frame = np.ascontiguousarray(frame_CHW.permute(1, 2, 0).numpy())
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    paths[5].write_bytes(b"this is no video at all")
    return paths


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    """Gives modules of lmms-eval by name, real or recorded."""
    if not INSTALLED:
        recorded_lmms_eval.install(monkeypatch)
    lmms_eval._model_class.cache_clear()
    yield lambda name: importlib.import_module(f"lmms_eval.{name}")
    lmms_eval._model_class.cache_clear()


def make(harness: Any, arguments: str, **config: Any) -> Any:
    """The model as the harness makes it: from the class that the manifest names."""
    path, _, name = lmms_eval.manifest().chat_class_path.rpartition(".")
    cls = getattr(importlib.import_module(path), name)
    assert issubclass(cls, harness("api.model").lmms) and cls.is_simple is False
    return cls.create_from_arg_string(arguments, {"batch_size": 1, "device": None} | config)


def requests_for(harness: Any, model: Any, shown: list[Any], **generation: Any) -> list[Any]:
    """Requests in the form that a task of the harness builds for a chat model."""
    docs = [{"shown": item if isinstance(item, tuple) else (item,)} for item in shown]
    model.task_dict = {"task": {"test": docs}}
    to_messages = lambda doc: messages(*doc["shown"])  # noqa: E731
    arguments = {"max_new_tokens": 5, "until": ["\n\n"]} | generation
    metadata = {"task": "task", "repeats": 1}
    return [
        harness("api.instance").Instance(
            request_type="generate_until",
            arguments=("context", to_messages, dict(arguments), index, "task", "test"),
            idx=0,
            metadata=metadata | {"doc_id": index},
        )
        for index in range(len(docs))
    ]


def is_clean(model: torch.nn.Module) -> bool:
    """Whether nothing of ours is left; transformers keeps hooks of its own after a first call."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    ours = [hook for hook in hooks if "foveate" in (getattr(hook, "__module__", None) or "foveate")]
    with reduce(model, "divprune", retain=0.5):
        pass  # refuses a model that still carries a recipe
    return not ours


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [RECIPE, "'tome(r=2, retain=0.8)@encoder + holitom(tau=0.65)'", f' "{RECIPE}" ']
)
def test_a_recipe_survives_the_argument_string(text: str, harness) -> None:
    parse = harness("utils").simple_parse_args_string
    given = parse(f"pretrained=org/name,recipe={text.strip()},retain=0.1,batch_size=4,device=cpu")
    assert given["retain"] == 0.1 and given["batch_size"] == 4 and given["pretrained"] == "org/name"
    want = Recipe.parse("tome(r=2, retain=0.8)@encoder + holitom(tau=0.65)")
    assert read_recipe(given["recipe"]) == read_recipe(text) == want


def test_commas_of_a_bare_recipe_are_named_in_the_error(harness) -> None:
    given = harness("utils").simple_parse_args_string("pretrained=a,recipe=tome(r=2,retain=0.8)")
    with pytest.raises(RecipeError, match="Write ; in place of ,"):
        Settings.read(**given)


def test_a_recipe_may_be_a_file(tmp_path: Path, harness) -> None:
    recipe = Recipe.parse("tome(r=2)@encoder + divprune")
    recipe.save(tmp_path / "mine.json")
    argument = f"pretrained=a,recipe={tmp_path / 'mine.json'},tokens=64"
    settings = Settings.read(**harness("utils").simple_parse_args_string(argument))
    assert settings.recipe == recipe and settings.budget.tokens == 64
    assert read_recipe("untouched") is read_recipe(None) is read_recipe("") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs pretrained=CHECKPOINT"),
        ({"pretrained": "a", "max_frames_num": 8}, "has no max_frames_num; its arguments are"),
        ({"pretrained": "a", "recipe": "nosuch"}, "nosuch"),
        ({"pretrained": "a", "recipe": "divprune", "retain": 2}, "must lie in"),
        ({"pretrained": "a", "recipe": "divprune", "retain": 0.5, "tokens": 4}, "not both"),
        ({"pretrained": "a", "retain": 0.5}, "A budget needs a recipe"),
        ({"pretrained": "a", "max_frames": 0}, "max_frames must be a whole number >= 1"),
        ({"pretrained": "a", "batch_size": "auto"}, "batch_size must be a whole number"),
        ({"pretrained": "a", "batch_size": 1.5}, "batch_size must be a whole number"),
        ({"pretrained": "a", "dtype": "int8"}, "dtype must be auto, float32"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.read(**arguments)


def test_what_the_string_names_wins_over_the_command(harness, folder: Path) -> None:
    model = make(harness, f"pretrained={folder},batch_size=3,device=cpu", device="meta")
    assert model.batch_size == 3 and model.device == torch.device("cpu")
    assert make(harness, f"pretrained={folder},device=cpu", batch_size="2").batch_size == 2


def test_a_recipe_that_cannot_act_is_refused_when_the_model_is_made(harness, folder: Path) -> None:
    with pytest.raises(ValueError, match="layer = 99 does not exist"):
        make(harness, f"pretrained={folder},recipe=fastv(layer=99),retain=0.5,device=cpu")


def test_generation_arguments() -> None:
    greedy = {"max_new_tokens": 9, "do_sample": False, "temperature": None}
    greedy |= {"top_p": None, "top_k": None}
    assert generation_arguments({"max_new_tokens": 9, "temperature": 0.0, "top_p": 0.9}) == greedy
    assert generation_arguments({"max_gen_toks": 9, "do_sample": False, "image_sizes": 3}) == greedy
    assert generation_arguments({"do_sample": True, "temperature": 0})["do_sample"] is False
    assert generation_arguments({})["max_new_tokens"] == 1024
    drawn = generation_arguments({"max_new_tokens": 9, "temperature": 0.7, "num_beams": 2})
    want = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "num_beams": 2}
    assert drawn == want
    assert cut_at("one two three", ["three", "two"]) == "one "
    assert cut_at("one", []) == "one"


# -- the model in the harness's hands --------------------------------------------------------------


def test_the_entry_point_names_the_manifest(harness) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["foveate"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert isinstance(manifest, harness("models.registry_v2").ModelManifest)
    assert manifest.model_id == "foveate" and manifest.simple_class_path is None


def test_without_the_harness_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["lmms_eval", *(name for name in sys.modules if name.startswith("lmms_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "foveate\[eval\]"'):
        lmms_eval.manifest()
    with pytest.raises(AttributeError, match="no attribute 'Foveate'"):
        _ = lmms_eval.Foveate


def test_clips_are_answered_as_by_ask(harness, folder: Path, clips: list[Path]) -> None:
    model = make(harness, f"pretrained={folder},max_frames=5,device=cpu,batch_size=2")
    network, processor = model.answerer.model, model.answerer.processor
    replies = model.generate_until(requests_for(harness, model, [str(c) for c in clips[:5]]))
    for clip, reply in zip(clips, replies, strict=False):
        want = ask(network, processor, clip, QUESTION, frames=5, max_new_tokens=5)
        assert reply.text == want.text
        assert reply.token_counts.input_tokens == want.prompt_tokens
        assert reply.token_counts.output_tokens == want.new_tokens == 5
    assert len({reply.text for reply in replies}) > 1


def test_a_recipe_is_on_while_answering_and_off_after(
    harness, folder: Path, clips: list[Path]
) -> None:
    shown = [str(clip) for clip in clips[:5]]
    texts, figures = {}, {}
    for batch_size in (1, 3):
        model = make(
            harness,
            f"pretrained={folder},recipe={RECIPE},retain=0.3,max_frames=5,device=cpu,"
            f"batch_size={batch_size}",
        )
        network = model.answerer.model
        replies = model.generate_until(requests_for(harness, model, shown))
        texts[batch_size] = [reply.text for reply in replies]
        figures[batch_size] = harness(
            "models.model_utils.gen_metrics"
        ).get_logged_metrics_history()[-1]
        assert is_clean(network)
    assert texts[1] == texts[3]
    with reduce(network, read_recipe(RECIPE), retain=0.3) as run:
        kept, spent, whole = [], 0.0, 0.0
        for clip in shown:
            inputs = prepare_chats(model.answerer.processor, [read_chat(messages(clip), 5)])
            network.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
            kept.append(run.report.retained)
            spent += run.report.flops["reduced"]["total"]
            whole += run.report.flops["untouched"]["total"]
    for logged in figures.values():
        assert logged["visual_tokens_retained"] == pytest.approx(sum(kept) / len(kept))
        assert logged["flops_ratio"] == pytest.approx(spent / whole)
        assert logged["total_gen_tokens"] == 25 and logged["total_requests"] == 5
        assert 0 < logged["visual_tokens_retained"] < 0.5 < logged["flops_ratio"] < 1


def test_the_model_goes_when_the_harness_cleans_up(harness, folder: Path) -> None:
    model = make(harness, f"pretrained={folder},device=cpu")
    model.clean()
    with pytest.raises(RuntimeError, match="cleaned up"):
        model.generate_until(requests_for(harness, model, [pixels(3)]))


def test_other_kinds_of_requests_are_refused_in_words(harness, folder: Path) -> None:
    model = make(harness, f"pretrained={folder},device=cpu")
    for call in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="output_type: generate_until"):
            call([])


@with_package
def test_the_recording_is_true_to_the_package() -> None:
    for name, members in recorded_lmms_eval.MODULES.items():
        module = importlib.import_module(f"lmms_eval.{name}")
        for recorded in members:
            real = getattr(module, recorded.__name__)
            if dataclasses.is_dataclass(recorded):
                fields = {f.name: f.default for f in dataclasses.fields(real)}
                assert {f.name: f.default for f in dataclasses.fields(recorded)}.items() <= (
                    fields.items()
                )
            elif inspect.isfunction(recorded):
                assert list(inspect.signature(recorded).parameters) == list(
                    inspect.signature(real).parameters
                )
            elif name == "api.model":
                assert recorded.__dict__.keys() - {"__doc__", "__module__", "__firstlineno__"} <= (
                    real.__dict__.keys() | {"__static_attributes__", "__annotations__"}
                )
                assert getattr(recorded, "__abstractmethods__", None) == (
                    getattr(real, "__abstractmethods__", None)
                )


@with_package
def test_the_package_evaluates_a_local_task(
    folder: Path, clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    tasks = importlib.import_module("lmms_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [
        json.dumps({"video": str(clip), "question": QUESTION, "answer": "red"}) for clip in clips
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    (tmp_path / "utils.py").write_text(
        "def visual(doc):\n    return [doc['video']]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n\n"
        "def results(doc, results):\n    return {'words': float(len(results[0].split()))}\n"
    )
    (tmp_path / "local.yaml").write_text(
        f"""task: local_clips
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "test.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
process_results: !function utils.results
metric_list:
  - {{metric: words, aggregation: mean, higher_is_better: true}}
metadata: {{version: 0.0}}
"""
    )
    lmms_eval._model_class.cache_clear()
    results = evaluator.simple_evaluate(
        model="foveate",
        model_args=f"pretrained={folder},recipe={RECIPE},retain=0.3,max_frames=5,batch_size=2",
        tasks=["local_clips"],
        device="cpu",
        batch_size=1,
        task_manager=tasks.TaskManager(include_path=str(tmp_path), model_name="foveate"),
    )
    # Five clips are answered with four words each, the file that is no video with none.
    assert results["results"]["local_clips"]["words,none"] == pytest.approx(20 / 6)
    assert results["throughput"]["avg_unreadable"] == 1
    assert 0.2 < results["throughput"]["avg_visual_tokens_retained"] < 0.5


# -- chats ----------------------------------------------------------------------------------------

LAYOUTS = {
    "video": lambda i: (pixels(6, i),),
    "image": lambda i: (picture(i),),
    "two images": lambda i: (picture(i), picture(i + 1)),
    "two videos": lambda i: (pixels(3, i), pixels(6, i + 1)),
    "video and image": lambda i: (pixels(4, i), picture(i)),
    "text": lambda i: (),
}


@pytest.fixture(scope="module", params=["llava_onevision", "video_llava", "qwen2_5_vl", "qwen3_vl"])
def of_family(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    template = QWEN_TEMPLATE if "qwen" in request.param else None
    return load_model(save_checkpoint(request.param, tmp_path_factory.mktemp("any"), template))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_any_layout_answer_as_single_requests(
    of_family, layout: str, recwarn: pytest.WarningsRecorder
) -> None:
    shown = [LAYOUTS[layout](index) for index in range(3)]
    asked = [
        (messages(*items, text="a bike " * (index + 1)), {"max_new_tokens": 3})
        for index, items in enumerate(shown)
    ]
    found = {}
    for retain, batch_size in ((None, 1), (1.0, 3), (0.3, 1), (0.3, 3)):
        budget = {} if retain is None else {"recipe": "divprune", "retain": retain}
        settings = Settings.read(pretrained="x", max_frames=5, batch_size=batch_size, **budget)
        replies, account = Answerer(*of_family, settings).answer(asked)
        found[retain, batch_size] = replies
        if retain == 0.3:
            assert len(account.retained) == (0 if layout == "text" else 3)
            assert all(0.2 < kept < 0.4 for kept in account.retained)
    assert found[None, 1] == found[1.0, 3]
    assert found[0.3, 1] == found[0.3, 3]
    assert is_clean(of_family[0])


def test_answers_come_in_the_order_of_the_requests(loaded) -> None:
    shown = [pixels(5, 1), picture(2), pixels(5, 3), pixels(2, 4), pixels(5, 5)]
    asked = [(messages(item), {"max_new_tokens": 3}) for item in shown]
    asked[2] = (asked[2][0], {"max_new_tokens": 2})
    done: list[int] = []
    many, _ = Answerer(*loaded, Settings("x", batch_size=4)).answer(iter(asked), done.append)
    single = [Answerer(*loaded, Settings("x")).answer([one])[0][0] for one in asked]
    assert many == single and sum(done) == 5
    assert [reply.output_tokens for reply in many] == [3, 3, 2, 3, 3]


def test_what_cannot_be_read_is_answered_with_nothing(
    loaded, clips: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    shown = [str(clips[0]), str(clips[5]), "/missing.mp4", str(clips[1]), "https://x.org/a.mp4"]
    asked = [(messages(item), {"max_new_tokens": 2}) for item in shown]
    replies, account = Answerer(*loaded, Settings("x", max_frames=4, batch_size=2)).answer(asked)
    assert [bool(reply.text) for reply in replies] == [True, False, False, True, False]
    assert account.unreadable == 3 and "/missing.mp4" in caplog.text
    assert account.as_metrics() == {"unreadable": 3}


def test_answers_end_at_stops_and_at_the_end_token(loaded) -> None:
    model, _ = loaded
    asked = [(messages(pixels(4, index)), {"max_new_tokens": 6}) for index in range(3)]
    answerer = Answerer(*loaded, Settings("x", batch_size=3))
    plain, _ = answerer.answer(asked)
    words = plain[0].text.split()
    stop = words[2]
    cut, account = answerer.answer([(asked[0][0], {"max_new_tokens": 6, "until": [stop, "zz"]})])
    assert cut[0].text.split() == words[: words.index(stop)] and account.new_tokens == 6
    end = answerer.processor.tokenizer.convert_tokens_to_ids(stop)
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = end
        ended, account = answerer.answer(asked)
    finally:
        model.generation_config.eos_token_id = before
    for reply, whole in zip(ended, plain, strict=True):
        all_words = whole.text.split()
        want = all_words.index(stop) + 1 if stop in all_words else 6
        assert reply.output_tokens == want
        assert reply.text.split()[:want] == all_words[:want]
    assert account.new_tokens == sum(reply.output_tokens for reply in ended) < 18


def test_sampling_follows_the_seed_and_greedy_does_not(loaded) -> None:
    asked = [(messages(pixels(4)), {"max_new_tokens": 8, "temperature": 5.0, "top_k": 50})]
    answerer = Answerer(*loaded, Settings("x"))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(answerer.answer(asked)[0][0].text)
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_error_leaves_the_model_clean(loaded) -> None:
    def asked():
        yield messages(pixels(4)), {"max_new_tokens": 2}
        yield [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], {}

    settings = Settings("x", Recipe.parse("divprune"), retain=0.5)
    with pytest.raises(ValueError, match="content of the type 'audio'"):
        Answerer(*loaded, settings).answer(asked())
    assert is_clean(loaded[0])


def test_a_chat_keeps_turns_and_the_order_of_what_it_shows() -> None:
    asked = [
        {"role": "system", "content": "the house"},
        {"role": "user", "content": messages(picture(), pixels(9), picture(1))[0]["content"]},
        {"role": "assistant", "content": [{"type": "text", "text": "a bike"}]},
    ]
    chat = read_chat(asked, max_frames=4)
    assert chat.layout == (2, (4,))
    assert [turn["role"] for turn in chat.turns] == ["system", "user", "assistant"]
    kinds = [part["type"] for part in chat.turns[1]["content"]]
    assert kinds == ["image", "video", "image", "text"]
    assert chat.turns[0]["content"] == [{"type": "text", "text": "the house"}]
    assert np.array_equal(np.asarray(chat.images[1]), np.asarray(picture(1)))
    assert chat.videos[0].index.tolist() == Clip(pixels(9)).sample(4).index.tolist()
    assert asked[1]["content"][0]["url"].size == (64, 40)  # the messages are left as they were


@pytest.mark.parametrize(
    ("start", "end", "frames"),
    [
        (None, None, [0, 3, 7]),
        (0.5, 1.5, [2, 4, 6]),
        (1.6, None, [6, 7]),
        (0.3, 0.4, [1]),
        (0.0, 99.0, [0, 3, 7]),
    ],
)
def test_part_of_a_clip(
    clips: list[Path], start: float | None, end: float | None, frames: list[int]
) -> None:
    # Eight frames at 4 per second: frame n is on screen from n / 4 s on.
    part = {"type": "video", "url": str(clips[0]), "start_time": start, "end_time": end}
    wrapped = {"path": str(clips[0]), "video_start": start, "video_end": end}
    for content in (part, {"type": "video", "url": wrapped}):
        chat = read_chat([{"role": "user", "content": [content]}], max_frames=3)
        assert chat.videos[0].index.tolist() == frames
    with pytest.raises(VideoError, match=r"from 3\.0 s to 4\.0 s lies outside"):
        read_chat([{"role": "user", "content": [part | {"start_time": 3.0, "end_time": 4.0}]}])


def test_pictures_come_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    picture().save(path)
    forms = [picture(), picture().convert("RGBA"), str(path), path, f"file://{path}"]
    forms += [{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    content = [{"type": "image", "url": form} for form in forms]
    for image in read_chat([{"role": "user", "content": content}]).images:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(picture()))
    for broken in ({"bytes": b"nothing"}, {"caption": "x"}, str(tmp_path / "missing.png"), 3):
        with pytest.raises(VideoError):
            read_chat([{"role": "user", "content": [{"type": "image", "url": broken}]}])


def test_a_checkpoint_without_videos_says_so(tmp_path: Path) -> None:
    _, processor = load_model(save_checkpoint("llava", tmp_path))
    with pytest.raises(ValueError, match="takes no videos"):
        prepare_chats(processor, [read_chat(messages(pixels(3)))])
    chats = [read_chat(messages(picture())), read_chat(messages(picture(), picture()))]
    with pytest.raises(ValueError, match="one layout"):
        prepare_chats(processor, chats)


def test_real_video_processors_get_frames_and_no_sampling(loaded) -> None:
    # transformers' own video processors need torchvision; what is passed on can still be seen.
    seen: dict[str, Any] = {}

    class Processor:
        chat_template = None
        video_token, image_token = "<video>", "<image>"
        video_processor = SimpleNamespace(sample_frames=None)
        model_input_names = ("pixel_values_videos", "video_grid_thw")

        def __call__(self, **options: Any) -> dict[str, Any]:
            seen.update(options)
            return {}

    prepare_chats(Processor(), [read_chat(messages(Clip(pixels(9), fps=2)), max_frames=3)])
    assert seen["do_sample_frames"] is False and seen["videos"][0].shape == (3, 3, 40, 64)
    assert seen["video_metadata"][0].frames_indices == [0, 4, 8]
    assert seen["video_metadata"][0].fps == 2.0
    assert seen["text"] == ["USER: <video>\nwhat is in the video ASSISTANT:"]
