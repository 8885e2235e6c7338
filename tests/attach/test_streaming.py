"""Streams: equal to what they stand for, bounded, exact about the past, and without a trace."""

from __future__ import annotations

import inspect
import resource
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import foveate
from foveate.attach.stream_cache import StreamCache
from foveate.attach.streaming import StreamEngine, split_recipe
from foveate.core import Recipe
from foveate.core.stream import RecentMemory, StreamMemory, StreamStep
from foveate.errors import AttachmentError, UnsupportedModelError
from foveate.methods.videoscan import CarrierMemory, frame_carriers, stage2_allow
from foveate.video import Clip
from foveate.view.streaming import StreamError
from tiny import BOS, FIRST_TEXT, IMAGE, VIDEO, tiny_inputs, tiny_model

FAMILIES = ("llava", "llava_next_video", "llava_onevision", "video_llava")


def prompt_of(family: str, frames: int = 4) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of a whole prompt, the ids before and behind its frames, and pixels [T, 3, h, w]."""
    modality = "image" if family == "llava" else "video"
    inputs = tiny_inputs(family, modality=modality, frames=frames)
    ids = inputs["input_ids"][0]
    visual = (ids == (IMAGE if modality == "image" else VIDEO)).nonzero()[:, 0]
    pixels = inputs["pixel_values" if modality == "image" else "pixel_values_videos"]
    return inputs, ids[: visual[0]], ids[visual[-1] + 1 :], pixels.flatten(0, -4)


def given(family: str, pixels_T3hw: torch.Tensor) -> dict[str, torch.Tensor]:
    if family == "llava":
        return {"pixel_values": pixels_T3hw}
    return {"pixel_values_videos": pixels_T3hw[None]}


def engine_of(
    family: str, recipe: str | None, capacity: int | None = None, **options: Any
) -> tuple[StreamEngine, Any, torch.Tensor, torch.Tensor]:
    model = tiny_model(family)
    inputs, before, behind, pixels = prompt_of(family)
    memory, rest = split_recipe(recipe and Recipe.of(recipe), capacity, model)
    return StreamEngine(model, before, memory, rest, **options), inputs, behind, pixels


def logits_behind(engine: StreamEngine, behind: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        cache = engine.cache.open(engine.text.rotary_emb)
        hidden = engine._forward(engine.question_embeddings(behind), cache)
        return engine.model.get_output_embeddings()(hidden)[-len(behind) :]


def snapshot(cache: StreamCache) -> list[torch.Tensor]:
    parts = [p for layer in cache.layers for p in (layer.keys, layer.values, layer.position_S)]
    return [part.clone() for part in [*parts, cache.entry_S]]


@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_remembering_everything_is_the_plain_model(family: str, renumber: bool) -> None:
    engine, inputs, behind, pixels = engine_of(family, None, 100, renumber=renumber)
    for part in pixels.split(3):
        engine.push(given(family, part))
    with torch.inference_mode():
        expected = engine.model(**inputs).logits[0, -len(behind) :]
    assert torch.allclose(logits_behind(engine, behind), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_as_frames_one_by_one(family: str) -> None:
    # Evictions in the middle of a group included.
    _, _, _, pixels = prompt_of(family, 4)
    pixels = torch.cat([pixels, pixels.flip(-1), pixels.flip(-2)])
    results = []
    for group in (1, 5, len(pixels)):
        engine, _, behind, _ = engine_of(family, "videoscan(capacity=3)")
        for part in pixels.split(group):
            engine.push(given(family, part))
        results.append((engine.frames, logits_behind(engine, behind)))
    for frames, logits in results[1:]:
        assert frames == results[0][0]
        assert torch.allclose(logits, results[0][1], atol=1e-4)


class AllCarriers(CarrierMemory):
    """Never evicts; new tokens start where the block before them ended."""

    def __init__(self) -> None:
        super().__init__(capacity=1000)


def test_videoscan_is_one_prefill_under_its_training_mask() -> None:
    # Same blocks, same mask, and the positions of the stream: one forward over everything.
    family = "llava_onevision"
    model: Any = tiny_model(family)
    _, before, behind, pixels = prompt_of(family)
    engine = StreamEngine(model, before, AllCarriers())
    engine.push(given(family, pixels))
    with torch.inference_mode():
        features, _, frames = engine.features(given(family, pixels))
        size = len(features) // frames
        x_TND = features.unflatten(0, (frames, size))
        blocks = torch.cat([x_TND, frame_carriers(x_TND)[:, None]], dim=1).flatten(0, 1)
        text = engine.question_embeddings(behind)
        embeds = torch.cat([engine._embed(before), blocks, text])
        allowed = stage2_allow(len(before), frames, size, len(text))
        start_T = len(before) + torch.arange(frames)
        position = torch.cat(
            [
                torch.arange(len(before)),
                (start_T[:, None] + torch.arange(size + 1)).flatten(),
                len(before) + frames + torch.arange(len(text)),
            ]
        )
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        hidden = engine.text(
            inputs_embeds=embeds[None], attention_mask=mask[None, None], position_ids=position[None]
        ).last_hidden_state[0]
        expected = model.get_output_embeddings()(hidden)[-len(behind) :]
    assert torch.allclose(logits_behind(engine, behind), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "recipe", ["videoscan(capacity=4)", "videoscan(capacity=4, add_kv=2)", None, "divprune"]
)
def test_a_question_leaves_no_trace(recipe: str | None) -> None:
    family = "llava_onevision"
    engine, _, behind, pixels = engine_of(family, recipe, None if recipe else 2)
    other, _, _, _ = engine_of(family, recipe, None if recipe else 2)
    engine.push(given(family, pixels))
    other.push(given(family, pixels))
    before = snapshot(engine.cache)
    first, shares = engine.answer(behind, 5)
    for old, new in zip(before, snapshot(engine.cache), strict=True):
        assert torch.equal(old, new)
    assert len(first) == 5
    assert len(shares) == len(engine.frames)
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert engine.answer(behind, 5) == (first, shares)
    # And so does the stream after it.
    for one in (engine, other):
        one.push(given(family, pixels.flip(-1)))
    assert torch.equal(logits_behind(engine, behind), logits_behind(other, behind))
    engine.close()
    other.close()


@pytest.mark.parametrize("recipe", ["videoscan(capacity=4)", "videoscan(capacity=4, add_kv=3)"])
def test_cache_length(recipe: str) -> None:
    # Card: s + min(n, M - 1) slots, times 1 + a with VideoScan+.
    engine, _, _, pixels = engine_of("llava_onevision", recipe)
    per_frame = 4 if "add_kv" in recipe else 1
    for frame in range(9):
        engine.push(given("llava_onevision", pixels[frame % 4][None]))
        remembered = min(frame + 1, 3)
        assert len(engine.frames) == engine.cache.num_entries == remembered
        for layer in engine.cache.layers:
            assert layer.keys.shape[2] == engine.cache.num_system + per_frame * remembered
        assert engine.frames[-1] == frame  # the newest is never evicted


class Failing(StreamMemory):
    """Fails in the middle of a group."""

    def push(self, x_LD: torch.Tensor, frame_L: torch.Tensor, num_frames: int) -> StreamStep:
        raise RuntimeError("out of memory, say")


def test_a_failed_group_breaks_the_stream() -> None:
    model = tiny_model("llava_onevision")
    _, before, _, pixels = prompt_of("llava_onevision")
    engine = StreamEngine(model, before, Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.push(given("llava_onevision", pixels))
    with pytest.raises(AttachmentError, match="failed halfway"):
        engine.push(given("llava_onevision", pixels))


def test_recent_window_reads_its_keys_at_contiguous_positions() -> None:
    engine, _, behind, pixels = engine_of("llava_onevision", None, 3)
    engine.push(given("llava_onevision", pixels))
    assert engine.frames == [1, 2, 3]
    layer = engine.cache.layers[0]
    assert layer.position_S.unique().numel() < engine.cache.length  # where they were computed
    before = logits_behind(engine, behind)
    engine.cache.renumber = False
    assert not torch.allclose(before, logits_behind(engine, behind), atol=1e-3)


def test_window_of_one_frame_is_that_frame_alone() -> None:
    engine, _, behind, pixels = engine_of("llava_onevision", None, 1)
    alone, _, _, _ = engine_of("llava_onevision", None, 1)
    engine.push(given("llava_onevision", pixels))
    alone.push(given("llava_onevision", pixels[-1:]))
    assert torch.allclose(logits_behind(engine, behind), logits_behind(alone, behind), atol=1e-4)


def test_group_methods_shorten_what_is_remembered() -> None:
    engine, _, _, pixels = engine_of("llava_onevision", "divprune(retain=0.5)", 100)
    plain, _, _, _ = engine_of("llava_onevision", None, 100)
    for one in (engine, plain):
        one.push(given("llava_onevision", pixels))
    kept = engine.cache.length - engine.cache.num_system
    full = plain.cache.length - plain.cache.num_system
    assert kept == pytest.approx(full / 2, abs=1)
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("fastv", "acts at decoder"),
        ("quickvideo", "acts at cache"),
        ("recoverable", "the question is not known"),
        ("videoscan + videoscan", "2 memories"),
    ],
)
def test_methods_that_cannot_stream_are_refused(recipe: str, reason: str) -> None:
    with pytest.raises(AttachmentError, match=reason):
        split_recipe(Recipe.of(recipe), None, tiny_model("llava_onevision"))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_vl", "between its frames"),
        ("internvl", "between its frames"),
        ("llava_next", "between its"),
    ],
)
def test_families_that_cannot_stream_are_refused(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        StreamEngine(tiny_model(family), torch.tensor([BOS]), RecentMemory(2))


def test_attached_models_are_refused_and_left_alone() -> None:
    model = tiny_model("llava_onevision")
    with (
        foveate.reduce(model, "divprune", retain=0.5),
        pytest.raises(AttachmentError, match="carr"),
    ):
        StreamEngine(model, torch.tensor([BOS]), RecentMemory(2))


# -- foveate.Stream -------------------------------------------------------------------------------


class Words:
    """A tokenizer that knows numbers."""

    def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
        special = {"<video>": VIDEO, "<bos>": BOS}
        ids = [special.get(word, FIRST_TEXT + len(word)) for word in text.split()]
        return {"input_ids": torch.tensor([ids])}

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<video>": VIDEO}[token]

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


class Frames48:
    """Frames of any size as a 16-pixel video of the model's range."""

    def __call__(self, videos: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values_videos": torch.stack([v.float() / 127.5 - 1 for v in videos])}


def chat(turns: Any, **options: Any) -> str:
    return f"<bos> see <video> {turns[0]['content'][1]['text']} :"


def processor_of() -> Any:
    return SimpleNamespace(
        tokenizer=Words(),
        video_processor=Frames48(),
        video_token="<video>",
        chat_template="as below",
        apply_chat_template=chat,
    )


def frames_of(count: int, side: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def stream_of(recipe: str | None = "videoscan", **options: Any) -> foveate.Stream:
    return foveate.Stream(tiny_model("llava_onevision"), processor_of(), recipe, **options)


def test_stream_answers_with_times_and_evidence() -> None:
    said: list[str] = []
    with stream_of(capacity=4, fps=2) as stream:
        stream.push(frames_of(3))
        stream.push(frames_of(1, seed=1)[0], seconds=[9.5])
        stream.push(frames_of(1, seed=2).numpy())
        answer = stream.ask("what is it", max_new_tokens=3, on_text=said.append)
        assert stream.memory.pushed == 5
        assert stream.memory.seconds == answer.seconds
        assert stream.ask("what is it", max_new_tokens=3).text == answer.text
    assert len(answer.seconds) == len(answer.evidence) == 3
    assert answer.seconds[-1] == 10.0
    assert set(answer.seconds) <= {0.0, 0.5, 1.0, 9.5, 10.0}
    assert said[-1] == answer.text
    assert len(said) == answer.new_tokens == 3
    assert 0 < answer.first_token <= answer.total


def test_times_can_be_said() -> None:
    texts = []
    for say in (False, True):
        with stream_of(None, capacity=2, say_times=say) as stream:
            stream.push(frames_of(2))
            texts.append(stream.ask("what is it", max_new_tokens=6).text)
    assert texts[0] != texts[1]


def test_stream_follows_a_clip() -> None:
    clip = Clip(frames_of(11), fps=1)
    frames = clip.take(range(11))
    for source in (clip, clip.stream(chunk=2), frames, iter([frames])):
        with stream_of(None, capacity=5, group=4) as stream:
            times = list(stream.follow(source, start=100))
            assert times == sorted(times)
            assert times[-1] == 110
            assert stream.memory.seconds == (106, 107, 108, 109, 110)
    assert len(times) == 1


def test_state_errors() -> None:
    stream = stream_of()
    with pytest.raises(StreamError, match="No frame"):
        stream.ask("what")
    stream.push(frames_of(1))
    with pytest.raises(ValueError, match="empty"):
        stream.ask("  ")
    with pytest.raises(ValueError, match="max_new_tokens"):
        stream.ask("what", max_new_tokens=0)
    stream.close()
    stream.close()
    for use in (
        lambda: stream.push(frames_of(1)),
        lambda: stream.ask("what"),
        lambda: stream.memory,
        lambda: next(stream.follow(Clip(frames_of(2)))),
        stream.__enter__,
    ):
        with pytest.raises(StreamError, match="closed"):
            use()
    assert "closed" in repr(stream)


@pytest.mark.parametrize(
    ("frames", "seconds", "reason"),
    [
        (torch.zeros(2, 3, 48, 48), None, "uint8"),
        (np.zeros((2, 48, 48, 3), np.uint8), None, "uint8"),
        (torch.zeros(48, 48, dtype=torch.uint8), None, "uint8"),
        (torch.zeros(0, 3, 48, 48, dtype=torch.uint8), None, "at least one"),
        (frames_of(2), [1.0], "1 times for 2"),
        (frames_of(2), [1.0, 1.0], "ascending"),
        (frames_of(1), [0.0], "go on from push to push"),
    ],
)
def test_bad_frames(frames: Any, seconds: Any, reason: str) -> None:
    with stream_of() as stream:
        stream.push(frames_of(1), seconds=[0.0])
        with pytest.raises(ValueError, match=reason):
            stream.push(frames, seconds)
        assert stream.memory.pushed == 1


@pytest.mark.parametrize("options", [{"group": 0}, {"fps": 0}, {"capacity": 0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        stream_of(None, **options)


def test_closing_restores_the_model() -> None:
    model: Any = tiny_model("llava_onevision")

    def marks() -> list[Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return [hooks, [sorted(vars(m)) for m in model.modules()]]

    with foveate.Stream(model, processor_of()) as stream:
        stream.push(frames_of(1))  # transformers puts hooks of its own at the first call
    before = marks()
    with foveate.Stream(
        model, processor_of(), "divprune + videoscan(add_kv=1)", retain=0.5
    ) as stream:
        stream.push(frames_of(3))
        assert marks() != before
    assert marks() == before
    assert inspect.ismethod(model.model.get_video_features)


def test_threads_share_a_stream() -> None:
    with stream_of(capacity=3, group=1) as stream:
        stream.push(frames_of(1))
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                for _ in range(5):
                    answer = stream.ask("what", max_new_tokens=2)
                    assert len(answer.seconds) == len(answer.evidence)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        for seed in range(8):
            stream.push(frames_of(1, seed=seed))
        thread.join(30)
        assert not errors
        assert stream.memory.pushed == 9


def test_ten_thousand_frames_in_flat_memory() -> None:
    # A scene that hardly changes, with one frame of its own early on.
    capacity, total, needle, step = 16, 10_000, 137, 500
    model = tiny_model(
        "llava_onevision",
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    )
    generator = torch.Generator().manual_seed(0)
    scene = torch.randint(0, 256, (3, 16, 16), generator=generator)
    other = torch.randint(0, 256, (3, 16, 16), generator=generator)
    curve, resident = [], []
    with foveate.Stream(model, processor_of(), "videoscan", capacity=capacity, group=64) as stream:
        for first in range(0, total, step):
            noise = torch.randint(-3, 4, (step, 3, 16, 16), generator=generator)
            frames = (scene + noise).clamp(0, 255).to(torch.uint8)
            if first == 0:
                frames[needle] = other.to(torch.uint8)
            stream.push(frames)
            state = stream.memory
            curve.append((len(state.seconds), state.slots, state.num_bytes))
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        assert state.pushed == total
        assert set(curve) == {curve[0]}
        assert len(state.seconds) == capacity - 1
        assert state.seconds[-1] == total - 1
        assert needle in state.seconds
        answer = stream.ask("what is it", max_new_tokens=2)
    assert needle in answer.seconds
    # Peak resident memory of the process, in KiB: no growth with the number of frames.
    assert resident[-1] - resident[2] < 64 * 1024


def test_stream_follows_live_sources(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "live.ts"
    with av.open(str(path), "w") as out:
        track = out.add_stream("mpeg2video", rate=25)
        track.width, track.height, track.pix_fmt = 48, 48, "yuv420p"
        for number in range(100):
            frame = av.VideoFrame(48, 48, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([number]) * plane.buffer_size)
            out.mux(track.encode(frame))
        out.mux(track.encode())
    with stream_of(None, capacity=5, fps=2) as stream:
        times = list(stream.follow(path, live=True, growing=True, timeout=1, chunk=1))
        assert times == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5], abs=0.05)
        with foveate.Live(path, fps=1, chunk=2) as live:
            assert list(stream.follow(live, start=10))[-1] == pytest.approx(13, abs=0.05)
        assert stream.memory.pushed == 12
        assert stream.ask("what", max_new_tokens=2).seconds == pytest.approx(
            [3.5, 10, 11, 12, 13], abs=0.05
        )
        with pytest.raises(ValueError, match="growing are for live sources"):
            next(stream.follow(path, growing=True))
