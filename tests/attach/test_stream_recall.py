"""Streams whose past is called back: equal to a reduced prompt, read anew each time, bounded."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_streaming import frames_of, given, processor_of, prompt_of

import foveate
from foveate.attach.stream_recall import RecallEngine
from foveate.attach.streaming import split_recipe
from foveate.core import Recipe
from foveate.core.stream import RecallMemory
from foveate.errors import AttachmentError
from foveate.view.streaming import StreamError
from tiny import BOS, tiny_model

RECIPE = "video_streaming(clip_frames=2, clips=1)"
#: Families whose videos a prompt can hold, and the stream reads.
VIDEOS = ("llava_next_video", "llava_onevision", "video_llava")


def engine_of(family: str, recipe: str = RECIPE, **options: Any) -> tuple[RecallEngine, Any, Any]:
    model = tiny_model(family)
    _, before, behind, pixels = prompt_of(family, 8)
    memory, rest = split_recipe(Recipe.of(recipe), None, model)
    assert isinstance(memory, RecallMemory)
    return RecallEngine(model, before, memory, rest, **options), behind, pixels


def logits_behind(engine: RecallEngine, behind: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        store = engine._read_recalled(engine.recall(behind))
        cache = store.open(engine.text.rotary_emb)
        hidden = engine._forward(engine.question_embeddings(behind), cache)
        return engine.model.get_output_embeddings()(hidden)[-len(behind) :]


@pytest.mark.parametrize("clips", [1, 2, 9])
@pytest.mark.parametrize("family", VIDEOS)
def test_a_question_reads_what_the_reduced_prompt_holds(family: str, clips: int) -> None:
    recipe = f"video_streaming(clip_frames=2, clips={clips})"
    engine, behind, pixels = engine_of(family, recipe)
    inputs, *_ = prompt_of(family, 8)
    for part in pixels.split(3):
        engine.push(given(family, part))
    with torch.inference_mode(), foveate.reduce(engine.model, recipe) as run:
        expected = engine.model(**inputs).logits[0, -len(behind) :]
    (item,) = run.report.items
    assert item.after < item.before
    torch.testing.assert_close(logits_behind(engine, behind), expected, atol=1e-4, rtol=1e-4)
    anchors = item.reduction.anchor_BM[0]
    shown = item.grid.positions()[anchors[item.grid.kinds()[anchors] == 0], 0]
    assert engine.recall(behind).number_L.equal(shown)


def test_images_of_a_stream_are_clips_too() -> None:
    engine, behind, pixels = engine_of("llava")
    for turned in (pixels, pixels.flip(-1), pixels.flip(-2), -pixels):
        engine.push(given("llava", turned))
    assert len(engine.recall(behind).clips) == 1 and engine.frames == [0, 1, 2, 3]
    new, shares = engine.answer(behind, 3)
    assert len(new) == 3 and len(shares) == 2 and sum(shares) == pytest.approx(1, abs=1e-5)


def test_groups_are_as_frames_one_by_one() -> None:
    results = []
    for size in (1, 3, 8):
        engine, behind, pixels = engine_of("llava_onevision", "video_streaming(clip_frames=3)")
        for part in pixels.split(size):
            engine.push(given("llava_onevision", part))
        results.append((engine.recall(behind), logits_behind(engine, behind), engine.num_bytes))
    for recall, logits, num_bytes in results[1:]:
        assert recall.number_L.equal(results[0][0].number_L)
        torch.testing.assert_close(recall.x_LD, results[0][0].x_LD, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, results[0][1], atol=1e-4, rtol=1e-4)
        assert num_bytes == results[0][2]


def test_asking_again_encodes_nothing_and_leaves_no_trace() -> None:
    engine, behind, pixels = engine_of("llava_onevision")
    calls = {"encoder": 0, "text": 0}

    def count(name: str) -> Any:
        def note(*_: Any) -> None:
            calls[name] += 1

        return note

    model: Any = engine.model
    handles = [
        model.model.vision_tower.register_forward_hook(count("encoder")),
        engine.text.register_forward_hook(count("text")),
    ]
    engine.push(given("llava_onevision", pixels))
    assert calls == {"encoder": 1, "text": 0}, "the language model reads nothing while it watches"
    slots, num_bytes = engine.cache.length, engine.num_bytes
    answers = [engine.answer(behind, 4) for _ in range(3)]
    other = engine.answer(behind.flip(0), 4)
    assert calls["encoder"] == 1 and calls["text"] > 0
    assert answers[0] == answers[1] == answers[2] and len(other[0]) == 4
    assert (engine.cache.length, engine.num_bytes) == (slots, num_bytes)
    assert slots == engine.cache.num_system
    for handle in handles:
        handle.remove()


def test_methods_may_shorten_the_groups_before() -> None:
    engine, behind, pixels = engine_of("llava_onevision", f"divprune(retain=0.5) + {RECIPE}")
    plain, _, _ = engine_of("llava_onevision")
    for one in (engine, plain):
        one.push(given("llava_onevision", pixels[:4]))
    assert 0 < len(engine.recall(behind).x_LD) <= len(plain.recall(behind).x_LD)
    engine.close()


def test_refusals() -> None:
    with pytest.raises(AttachmentError, match="M-RoPE"):
        foveate.Stream(tiny_model("qwen2_5_vl"), processor_of(), RECIPE)
    with pytest.raises(AttachmentError, match="2 memories"):
        split_recipe(Recipe.of(f"{RECIPE} + videoscan"), None, tiny_model("llava_onevision"))
    with pytest.raises(ValueError, match="renumber"):
        stream_of(renumber=True)
    with pytest.raises(ValueError, match="companion"):
        foveate.Stream(
            tiny_model("llava_onevision"), processor_of(), "videoscan", companion=Looks([0.0])
        )


class BrokenMemory(RecallMemory):
    num_bytes = 0

    def push(self, group: Any) -> int:
        raise RuntimeError("out of memory, say")

    def recall(self, text_1C: torch.Tensor) -> Any:
        raise NotImplementedError


def test_a_failed_group_breaks_the_stream() -> None:
    engine = RecallEngine(tiny_model("llava_onevision"), torch.tensor([BOS]), BrokenMemory())
    frames = given("llava_onevision", frames_of(1).float())
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.push(frames)
    with pytest.raises(AttachmentError, match="failed halfway"):
        engine.push(frames)


# -- foveate.Stream -------------------------------------------------------------------------------


def stream_of(recipe: str = RECIPE, **options: Any) -> foveate.Stream:
    return foveate.Stream(tiny_model("llava_onevision"), processor_of(), recipe, **options)


class Looks:
    """A companion for which every frame is its brightness, and every question asks for white."""

    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def embed_text(self, text: str) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]])

    def embed_pictures(self, pixels_T3hw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        light_T = pixels_T3hw.float().mean((1, 2, 3)) / 255
        self.seen += light_T.tolist()
        return torch.stack([light_T, 1 - light_T], dim=1), torch.empty(0)


def clips_of_dark(num: int, needle: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 80, (num, 3, 48, 48), generator=generator, dtype=torch.uint8)
    pixels[2 * needle : 2 * needle + 2] = 255
    return pixels


def test_the_needle_is_called_back_and_the_answer_says_so() -> None:
    looks: Any = Looks([])
    with stream_of(companion=looks, fps=0.5, group=5) as stream:
        stream.push(clips_of_dark(401, 137))
        answer = stream.ask("what is it", max_new_tokens=3)
        again = stream.ask("what is it", max_new_tokens=3)
        state = stream.memory
    needle, running = answer.clips
    assert (needle.start, needle.end, needle.running) == (548.0, 550.0, False)
    assert (running.start, running.end, running.running) == (800.0, 800.0, True)
    assert needle.relevance == pytest.approx(1) and running.relevance < 0.5
    assert answer.seconds == (548.0, 550.0, 800.0)
    assert needle.evidence == pytest.approx(sum(answer.evidence[:2]))
    assert needle.evidence + running.evidence == pytest.approx(1, abs=1e-5)
    assert (again.text, again.clips) == (answer.text, answer.clips)
    assert len(looks.seen) == state.pushed == 401, "every frame is compared once"
    assert len(state.seconds) == 401


def test_times_of_the_clips_can_be_said() -> None:
    asked: list[list[int]] = []
    looks: Any = Looks([])
    for say in (False, True):
        with stream_of(companion=looks, say_times=say) as stream:
            stream.push(clips_of_dark(20, 3))
            engine: Any = stream._engine
            read = engine.answer
            engine.answer = lambda ids, *rest, read=read, **more: (
                asked.append(ids.tolist()),
                read(ids, *rest, **more),
            )[1]
            assert stream.ask("what is it", max_new_tokens=2).clips[0].start == 6.0
    said = "The video has lasted 19.00 seconds so far. The clips you see are from 6.00s to 7.00s."
    assert len(asked[1]) == len(asked[0]) + len(said.split())


def test_memory_is_bounded_by_clips() -> None:
    curve = []
    with stream_of(capacity=5, group=8) as stream:
        for seed in range(12):
            stream.push(frames_of(8, 48, seed))
            state = stream.memory
            curve.append((len(state.seconds), state.slots, state.num_bytes))
        assert state.seconds == tuple(map(float, range(86, 96)))
        assert all(clip.start >= 86 for clip in stream.ask("what is it", max_new_tokens=1).clips)
    assert curve[0][0] == 8 and set(curve[1:]) == {curve[1]} and curve[1][0] == 10
    with stream_of(group=8) as stream:
        grown = []
        for seed in range(6):
            stream.push(frames_of(8, 48, seed))
            grown.append(stream.memory.num_bytes)
    steps = {after - before for before, after in pairwise(grown)}
    assert len(steps) == 1, "every clip costs the same"


def test_before_the_first_frame() -> None:
    with stream_of() as stream, pytest.raises(StreamError, match="No frame"):
        stream.ask("what")
