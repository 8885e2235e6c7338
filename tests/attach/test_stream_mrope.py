"""Streams on models that number tokens by time, row and column, and join frames in pairs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import foveate
from foveate.attach.stream_positions import GridClock, grid_clock
from foveate.attach.streaming import StreamEngine, split_recipe
from foveate.checkpoints import frame_inputs
from foveate.checkpoints.processors import PackedFrames
from foveate.core import Recipe
from foveate.core.stream import RecentMemory
from foveate.errors import AttachmentError
from foveate.models.registry import adapter_for
from tiny import BOS, FIRST_TEXT, VIDEO, tiny_inputs, tiny_model

FAMILIES = ("qwen2_vl", "qwen2_5_vl")


def parts_of(family: str, frames: int = 8) -> tuple[Any, Any, Any, Any]:
    """Inputs of a whole prompt, the ids before and behind its frames, and patches of each plane."""
    inputs = tiny_inputs(family, modality="video", frames=frames)
    ids = inputs["input_ids"][0]
    visual = (ids == VIDEO).nonzero()[:, 0]
    planes, rows, columns = inputs["video_grid_thw"][0].tolist()
    patches = inputs["pixel_values_videos"].view(planes, rows * columns, -1)
    return inputs, ids[: visual[0]], ids[visual[-1] + 1 :], patches


def given(patches: torch.Tensor, rows: int = 8) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[len(patches), rows, patches.shape[1] // rows]])
    return {"pixel_values_videos": patches.flatten(0, 1), "video_grid_thw": grid}


def engine_of(family: str, capacity: int = 100, recipe: str | None = None) -> StreamEngine:
    model = tiny_model(family)
    before = parts_of(family)[1]
    memory, rest = split_recipe(recipe and Recipe.of(recipe), capacity, model)
    return StreamEngine(model, before, memory, rest)


def logits_behind(engine: StreamEngine, behind: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        cache = engine.cache.open(engine.text.rotary_emb)
        position = engine.cache.text_positions(len(behind))
        hidden = engine._forward(engine.question_embeddings(behind), cache, position)
        return engine.model.get_output_embeddings()(hidden)


def at_rate(family: str, seconds: float) -> dict[str, torch.Tensor]:
    """What a prompt is told of its time; Qwen2-VL does not ask."""
    return {} if family == "qwen2_vl" else {"second_per_grid_ts": torch.tensor([seconds])}


@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_remembering_everything_is_the_plain_model(family: str, seconds: float) -> None:
    engine = engine_of(family)
    inputs, _, behind, patches = parts_of(family)
    times = [40 + seconds * plane for plane in range(4)]  # a stream need not begin at zero
    for part in (slice(0, 1), slice(1, 4)):
        engine.push(given(patches[part]), times[part])
    inputs = {**inputs, **at_rate(family, seconds)}
    with torch.inference_mode():
        expected = engine.model(**inputs).logits[0, -len(behind) :]
        ids = engine.model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert torch.allclose(logits_behind(engine, behind), expected, atol=1e-5, rtol=1e-5)
    new, evidence = engine.answer(behind, 10)
    assert new == ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(evidence) == 4
    assert sum(evidence) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_as_pairs_one_by_one(family: str) -> None:
    # Evictions in the middle of a group included.
    _, _, behind, patches = parts_of(family)
    results = []
    for group in (1, 3, 4):
        engine = engine_of(family, capacity=2)
        for at in range(0, 4, group):
            engine.push(given(patches[at : at + group]), [2.0 * p for p in range(4)][at:][:group])
        assert engine.frames == [2, 3]
        results.append(logits_behind(engine, behind))
    for logits in results[1:]:
        assert torch.allclose(logits, results[0], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_time_begins_anew_at_the_first_pair_that_is_remembered(family: str) -> None:
    _, _, behind, patches = parts_of(family)
    engine, alone = engine_of(family, capacity=1), engine_of(family, capacity=1)
    engine.push(given(patches), [0.0, 1.0, 500.0, 90_000.0])
    alone.push(given(patches[3:]), [7.0])
    assert torch.allclose(logits_behind(engine, behind), logits_behind(alone, behind), atol=1e-5)
    # However long a stream goes on, positions do not grow.
    two = engine_of(family, capacity=2)
    for plane in range(60):
        two.push(given(patches[plane % 4][None]), [2.0 * plane])
    assert int(two.cache._ranks(None).max()) < 40
    layer = two.cache.layers[0]
    assert layer.position_S.shape == (3, two.cache.length)


def test_time_counts_where_the_model_knows_it() -> None:
    for family, is_known in (("qwen2_vl", False), ("qwen2_5_vl", True)):
        _, _, behind, patches = parts_of(family)
        logits = []
        for times in ([0.0, 2.0, 4.0, 6.0], [0.0, 2.0, 4.0, 30.0]):
            engine = engine_of(family)
            engine.push(given(patches), times)
            logits.append(logits_behind(engine, behind))
        assert torch.allclose(*logits, atol=1e-5) is not is_known
        engine = engine_of(family)
        engine.push(given(patches))  # without times: a second per pair
        assert engine.cache.plane_E2[:, 0].tolist() == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="3 times for 4"):
            engine.push(given(patches), [1.0, 2.0, 3.0])


def test_how_a_model_numbers_videos() -> None:
    for family, clock in (
        ("qwen2_vl", GridClock(None, False, 2)),
        ("qwen2_5_vl", GridClock(2.0, False, 2)),
        ("llava_onevision", None),
    ):
        model = tiny_model(family)
        assert grid_clock(model, adapter_for(model)) == clock  # type: ignore[arg-type]
    clock = GridClock(2.0, True, 2)
    seconds = torch.tensor([5.0, 6.0, 7.3], dtype=torch.float64)
    assert clock.times(seconds, torch.tensor([True, True, True])).tolist() == [0, 2, 4]
    assert clock.times(seconds, torch.tensor([False, True, True]))[1:].tolist() == [0, 2]
    assert clock.times(seconds, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]
    assert clock.behind(10, 4, 30) == 41
    assert clock.behind(10, 4, 1) == 14
    assert GridClock(2.0, False, 2).behind(10, 4, 30) == 14


@pytest.mark.parametrize("family", FAMILIES)
def test_shortened_frames_keep_their_rows_and_columns(family: str) -> None:
    engine = engine_of(family, recipe="uniform(retain=0.5)")
    plain = engine_of(family)
    _, _, behind, patches = parts_of(family)
    for one in (engine, plain):
        one.push(given(patches), [0.0, 2.0, 4.0, 6.0])
    system = plain.cache.num_system
    full = {tuple(p) for p in plain.cache.layers[0].position_S[:, system:].t().tolist()}
    kept = [tuple(p) for p in engine.cache.layers[0].position_S[:, system:].t().tolist()]
    assert len(kept) == len(full) / 2
    assert set(kept) <= full
    # Text stands where it would behind whole frames.
    assert torch.equal(
        engine.cache.text_positions(3),
        plain.cache.text_positions(3),  # type: ignore[arg-type]
    )
    engine.answer(behind, 2)
    engine.close()


def test_what_is_refused() -> None:
    model = tiny_model("qwen2_5_vl")
    memory, _ = split_recipe(Recipe.of("videoscan"), None, model)
    with pytest.raises(AttachmentError, match="M-RoPE"):
        StreamEngine(model, torch.tensor([BOS]), memory)
    with pytest.raises(AttachmentError, match="renumber=False"):
        StreamEngine(model, torch.tensor([BOS]), RecentMemory(2), renumber=False)


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


def chat(turns: Any, **options: Any) -> str:
    return f"<bos> see <video> {turns[0]['content'][1]['text']} :"


def processor_of() -> Any:
    config = {"patch_size": 4, "merge_size": 2, "min_pixels": 32 * 32, "max_pixels": 32 * 32}
    return SimpleNamespace(
        tokenizer=Words(),
        video_processor=PackedFrames(config, counts_frames=False),
        video_token="<video>",
        chat_template="as below",
        apply_chat_template=chat,
    )


def frames_of(count: int, height: int = 40, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def stream_of(family: str = "qwen2_5_vl", **options: Any) -> foveate.Stream:
    return foveate.Stream(tiny_model(family), processor_of(), None, **options)


def one_shot(family: str, frames: torch.Tensor, question: str, fps: float) -> str:
    """What transformers answers to a prompt of exactly these frames."""
    processor = processor_of()
    visual = frame_inputs(processor, "video", frames)
    turns = [{"content": [{}, {"text": question}]}]
    ids = Words()(chat(turns))["input_ids"][0]
    place = int((ids == VIDEO).nonzero())
    count = int(visual["video_grid_thw"].prod()) // 4
    ids = torch.cat([ids[:place], torch.full((count,), VIDEO), ids[place + 1 :]])[None]
    model: Any = tiny_model(family)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=((ids == VIDEO) * 2).int(),
        **visual,
        **at_rate(family, 2 / fps),
        max_new_tokens=6,
        do_sample=False,
    )
    return Words().decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("count", [6, 7])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_answers_as_a_prompt_of_its_frames(family: str, group: int, count: int) -> None:
    # Frames come by ones, twos and threes; an odd one is doubled, as processors do with clips.
    frames, fps = frames_of(count), 4.0
    with stream_of(family, group=group, fps=fps) as stream:
        for part in frames.split([1, 2, 3, *[1] * (count - 6)]):
            stream.push(part)
        answer = stream.ask("what is it", max_new_tokens=6)
        assert stream.memory.pushed == count
        assert answer.seconds == tuple(2 / fps * pair for pair in range(-(-count // 2)))
    assert answer.text == one_shot(family, frames, "what is it", fps)


def test_an_odd_frame_waits_for_its_partner() -> None:
    frames = frames_of(6)
    with stream_of() as asked, stream_of() as other:
        asked.push(frames[:1])
        assert asked.memory.seconds == ()
        first = asked.ask("what", max_new_tokens=3)
        assert first.seconds == (0.0,)
        assert asked.memory.seconds == ()
        asked.push(frames[1:3])
        assert asked.memory.seconds == (0.0,)
        assert asked.ask("what", max_new_tokens=3).seconds == (0.0, 2.0)
        asked.push(frames[3:])
        other.push(frames)
        # Questions have left no trace.
        both = [stream.ask("what is it", max_new_tokens=6) for stream in (asked, other)]
        assert both[0].text == both[1].text
        assert both[0].evidence == pytest.approx(both[1].evidence, abs=1e-5)
        assert asked.memory == other.memory


def test_frames_of_another_size_are_no_partners() -> None:
    with stream_of() as stream:
        stream.push(frames_of(3))
        stream.push(frames_of(2, 24, 56))
        assert stream.memory.seconds == (0.0, 2.0, 3.0)
        stream.ask("what", max_new_tokens=2)


def test_memory_is_bounded() -> None:
    with stream_of(capacity=2) as stream:
        sizes = []
        for _ in range(6):
            stream.push(frames_of(4))
            sizes.append(stream.memory.num_bytes)
        assert stream.memory.seconds == (20.0, 22.0)
        assert len(set(sizes)) == 1
