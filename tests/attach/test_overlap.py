"""Decoding, encoding and prefill at the same time: the same numbers, no chunk too many, no trace.

Legend: L tokens of a prompt, T frames.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from attach_suite import model_of
from torch import Tensor
from transformers.cache_utils import DynamicCache

import foveate
from foveate.attach.overlap import OverlappedPrefill
from foveate.attach.overlap_channel import OverlapTimeoutError
from foveate.attach.overlap_prompt import ChunkedPrompt
from foveate.attach.overlap_report import side_by_side
from foveate.core import Budget, Recipe, Reduction
from foveate.errors import AttachmentError, UnsupportedModelError
from foveate.methods.quickvideo import prune_keys
from foveate.models.registry import adapter_for
from tiny import Sample, tiny_inputs

FAMILIES = (
    "llava_onevision",
    "llava_next_video",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
TOLERANCE = 1e-5
WAIT = 30.0  # seconds; only a pipeline that does not overlap would wait so long


@lru_cache
def inputs_of(family: str, frames: int = 8) -> dict[str, Tensor]:
    return tiny_inputs(family, samples=(Sample(text=(5, 7), items=(f"video:{frames}",), seed=3),))


def chunks_of(inputs: dict[str, Tensor], prompt: ChunkedPrompt) -> list[dict[str, Tensor]]:
    """The pixels of every chunk, as the feature method takes them."""
    pixels, grid = inputs["pixel_values_videos"], inputs.get("video_grid_thw")
    if grid is None:
        return [{"pixel_values_videos": pixels[:, first:last]} for first, last in prompt.frames]
    planes, rows, columns = grid[0].tolist()
    counts = [len(part.planes) for part in prompt.grids]
    assert sum(counts) == planes
    return [
        {"pixel_values_videos": part, "video_grid_thw": torch.tensor([[count, rows, columns]])}
        for part, count in zip(
            pixels.split([count * rows * columns for count in counts]), counts, strict=True
        )
    ]


def pipeline(
    family: str,
    recipe: str | None = None,
    *,
    frames: int = 8,
    chunk: int = 4,
    source: Callable[[list[Any]], Any] = iter,
    prepare: Callable[[Any], Any] = lambda taken: taken,
    budget: Budget | None = None,
    encode_ahead: bool | None = True,
    **options: Any,
) -> OverlappedPrefill:
    model, inputs = model_of(family), inputs_of(family, frames)
    prompt = ChunkedPrompt.of(model, inputs, frames, chunk)
    return OverlappedPrefill(
        model,
        prompt,
        source(chunks_of(inputs, prompt)),
        prepare,
        None if recipe is None else Recipe.of(recipe),
        budget or Budget(0.5),
        encode_ahead=encode_ahead,
        **options,
    )


def generated(family: str, inputs: dict[str, Any], new: int = 5) -> tuple[Tensor, Tensor]:
    """Greedy ids and the logits they were chosen by."""
    out = model_of(family).generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def one_go(family: str, recipe: str | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    scope = nullcontext()
    if recipe is not None:
        scope = foveate.reduce(model_of(family), recipe, **options)
    with scope:
        return generated(family, inputs_of(family))


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("foveate-")]


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    yield
    assert not workers()
    for family in FAMILIES:
        foveate.attach.attachment.refuse_hooked(model_of(family))


# -- the same as in one go -------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_prefill_in_one_go(family: str, depth: int) -> None:
    ids, logits = one_go(family)
    for chunk in (2, 6):
        with pipeline(family, chunk=chunk, depth=depth) as read:
            read.run()
            got_ids, got_logits = generated(family, read.inputs)
        assert torch.equal(got_ids, ids)
        torch.testing.assert_close(got_logits, logits, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "family"),
    [("pool", family) for family in FAMILIES]
    + [
        ("zero_tprune@encoder", "llava_onevision"),
        ("tome@encoder", "llava_onevision"),
        ("tome@encoder + pool", "video_llava"),
    ],
)
def test_methods_that_act_per_frame_give_the_same(recipe: str, family: str) -> None:
    ids, logits = one_go(family, recipe, retain=0.5)
    with pipeline(family, recipe) as read:
        read.run()
        got_ids, got_logits = generated(family, read.inputs)
    assert torch.equal(got_ids, ids) and not read.notes
    torch.testing.assert_close(got_logits, logits, atol=TOLERANCE, rtol=1e-5)


def test_other_projector_methods_shorten_every_chunk_and_say_so() -> None:
    with pipeline("llava_onevision", "divprune") as read:
        read.run()
    (item,) = read.report.items
    sizes = [grid.num_tokens for grid in read.prompt.grids]
    assert item.before == sum(sizes) and item.after == sum(round(n / 2) for n in sizes)
    assert "divprune shortened every chunk as a video of its own" in read.report.notes


# -- QuickVideo ------------------------------------------------------------------------------------


def by_hand(family: str, retain: float) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Grouped prefill as the card words it, from the model's parts and the golden-tested pruning.

    Pruning a layer behind its attention changes nothing in later layers of the same chunk, so it
    may wait until all layers have run.
    """
    model: Any = model_of(family)
    inputs, adapter = inputs_of(family), adapter_for(model)
    text, base = adapter.language_model(model), adapter.base(model)
    prompt = ChunkedPrompt.of(model, inputs, 8, 4)
    entered: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append((kwargs["inputs_embeds"], kwargs["position_ids"], kwargs))

    handle = text.register_forward_pre_hook(note, with_kwargs=True)
    visual_L = inputs["input_ids"][0] == adapter.placeholder_ids(model)["video"]
    base(**inputs)
    handle.remove()
    embeds, _, given = entered[0]
    columns = [*prompt.columns, (prompt.columns[-1][1], embeds.shape[1])]
    kept: list[tuple[Tensor, Tensor]] = []
    hidden = None
    for number, (first, last) in enumerate(columns):
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(kept):
            cache.update(keys, values, layer)
        deep = {}
        mask = given.get("visual_pos_masks")
        if mask is not None and mask[:, first:last].any():
            before, mine = int(mask[:, :first].sum()), int(mask[:, first:last].sum())
            levels = [level[before : before + mine] for level in given["deepstack_visual_embeds"]]
            deep = {
                "visual_pos_masks": mask[:, first:last],
                "deepstack_visual_embeds": levels,
            }
        position = prompt.position_P1L[..., first:last]
        out = text(
            inputs_embeds=embeds[:, first:last],
            position_ids=position[0] if len(position) == 1 else position,
            past_key_values=cache,
            use_cache=True,
            **deep,
        )
        hidden, fresh = out.last_hidden_state, []
        for layer in cache.layers:
            keys, values = layer.keys, layer.values
            if number < len(prompt) and retain < 1:
                # Text stands before the visual tokens of its chunk, or between two planes.
                past = keys.shape[2] - (last - first)
                is_visual = visual_L[first:last]
                fresh_keys, fresh_values = (
                    keys[:, :, past:][:, :, is_visual],
                    values[:, :, past:][:, :, is_visual],
                )
                picked, _, _ = prune_keys(fresh_keys, fresh_values, 0, retain=retain)
                stays = ~is_visual
                stays[is_visual.nonzero()[picked, 0]] = True
                index = torch.cat([torch.arange(past), stays.nonzero()[:, 0] + past])
                keys, values = keys[:, :, index], values[:, :, index]
            fresh.append((keys, values))
        kept = fresh
    return kept, model.get_output_embeddings()(hidden[0, -1])


@pytest.mark.parametrize("family", FAMILIES)
def test_quickvideo_is_grouped_prefill_with_pruning(family: str) -> None:
    with torch.inference_mode():
        kept, logits = by_hand(family, 0.3)
    with pipeline(family, "quickvideo", budget=Budget(0.3)) as read:
        read.run()
        layers: Any = list(read.cache.layers)
        for layer, (keys, values) in zip(layers, kept, strict=True):
            length = layer.keys.shape[2]
            assert length < keys.shape[2] < read.prompt.ids_1L.shape[1]
            torch.testing.assert_close(layer.keys, keys[:, :, :length], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.values, values[:, :, :length], atol=1e-5, rtol=1e-5)
        _, got = generated(family, read.inputs, 1)
    torch.testing.assert_close(got[0, 0], logits.float(), atol=TOLERANCE, rtol=1e-5)
    _, together = one_go(family, "quickvideo", retain=0.3)
    assert not torch.allclose(got[0], together[0], atol=1e-2), "later chunks saw the pruned past"


def test_a_full_budget_changes_nothing() -> None:
    with pipeline("qwen2_5_vl") as plain:
        plain.run()
    with pipeline("qwen2_5_vl", "quickvideo", budget=Budget(1.0)) as full:
        full.run()
    for a, b in zip(plain.cache.layers, full.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_past_entries_stay_bit_for_bit_and_text_is_never_pruned() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            layer: Any = read.cache.layers[1]
            seen.append((layer.keys.clone(), layer.values.clone()))

    read = pipeline("llava_onevision", "quickvideo", chunk=2, budget=Budget(0.2), progress=note)
    with read:
        read.run()
    assert len(seen) == 4
    for earlier, later in pairwise(seen):
        for before, after in zip(earlier, later, strict=True):
            assert torch.equal(before, after[:, :, : before.shape[2]])
    video = [grid.num_tokens for grid in read.prompt.grids]
    text = read.prompt.columns[-1][1] - sum(video)
    assert seen[-1][0].shape[2] == text + sum(int(0.2 * n) for n in video)


def test_the_first_generated_position_does_not_depend_on_the_budget() -> None:
    for family in ("llava_onevision", "qwen2_5_vl"):
        text: Any = adapter_for(model_of(family)).language_model(model_of(family))
        found = []
        for retain in (1.0, 0.5, 0.1):
            with pipeline(family, "quickvideo", budget=Budget(retain)) as read:
                read.run()
                angles: list[Tensor] = []
                handle = text.rotary_emb.register_forward_hook(
                    lambda module, args, kwargs, out, angles=angles: angles.append(
                        torch.cat(out, -1)
                    ),
                    with_kwargs=True,
                )
                try:
                    generated(family, read.inputs, 3)
                finally:
                    handle.remove()
            found.append(angles[-1][..., -1, :])
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_layers_may_keep_different_counts() -> None:
    recipe = "quickvideo(start_layer=2, decay='linear')"
    with pipeline("llava_onevision", recipe) as read:
        read.run()
        lengths = [layer.keys.shape[2] for layer in read.cache.layers]
        ids, _ = generated("llava_onevision", read.inputs)
    assert lengths[0] == lengths[1] > lengths[2] > lengths[3]
    assert ids.shape[1] == read.prompt.ids_1L.shape[1] + 5
    tail = read.prompt.ids_1L.shape[1] - read.prompt.columns[-1][1]
    assert read.report.cache_lengths == [[length + tail for length in lengths]]


def test_a_count_of_tokens_is_shared_out() -> None:
    with pipeline("llava_onevision", "quickvideo", chunk=2, budget=Budget(tokens=24)) as read:
        read.run()
    text = read.prompt.columns[-1][1] - read.prompt.num_visual
    assert 20 <= read.cache.layers[0].keys.shape[2] - text <= 24


# -- the prompt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 100])
def test_chunks_cover_every_frame_and_token_once(family: str, chunk: int) -> None:
    model, inputs = model_of(family), inputs_of(family)
    prompt = ChunkedPrompt.of(model, inputs, 8, chunk)
    assert [f for first, last in prompt.frames for f in range(first, last)] == list(range(8))
    assert prompt.columns[0][0] == 0
    assert all(early[1] == late[0] for early, late in pairwise(prompt.columns))
    visual = inputs["input_ids"][0] == adapter_for(model).placeholder_ids(model)["video"]
    for (first, last), grid in zip(prompt.columns, prompt.grids, strict=True):
        assert int(visual[first:last].sum()) == grid.num_tokens
    assert not visual[prompt.columns[-1][1] :].any()


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "smolvlm", "video_llama_3"])
def test_other_families_are_refused(family: str) -> None:
    inputs = tiny_inputs(family)
    with pytest.raises(UnsupportedModelError, match="one chunk after another"):
        ChunkedPrompt.of(model_of(family), inputs, 4, 2)


def test_prompts_with_several_videos_or_samples_are_refused() -> None:
    two = (Sample(items=("video",), seed=0), Sample(items=("video",), seed=1))
    model = model_of("llava_onevision")
    with pytest.raises(AttachmentError, match="2 samples and 2 videos"):
        ChunkedPrompt.of(model, tiny_inputs("llava_onevision", samples=two), 4, 2)
    with pytest.raises(AttachmentError, match="73 video tokens, the features will have 64"):
        inputs = inputs_of("llava_onevision")
        short = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :7]}
        ChunkedPrompt.of(model, short, 7, 2)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        ChunkedPrompt.of(model, inputs_of("llava_onevision"), 8, 0)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("fastv", "end of the prompt"),
        ("holitom", "end of the prompt"),
        ("vista_llama", "end of the prompt"),
        ("quota@projector", "the question stands behind the video"),
        ("dycoke@cache", "the attention of the question"),
        ("video_xl2", "blocks of its own"),
    ],
)
def test_methods_that_need_the_whole_prompt_are_refused(recipe: str, why: str) -> None:
    with pytest.raises(AttachmentError, match=why):
        pipeline("llava_onevision", recipe)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="depth must be at least 0"):
        pipeline("llava_onevision", depth=-1)
    with pytest.raises(ValueError, match="one budget"):
        pipeline("llava_onevision", "quickvideo", budget=Budget((0.5, 0.5)))


def test_a_model_with_a_recipe_is_refused() -> None:
    with (
        foveate.reduce(model_of("llava_onevision"), "divprune"),
        pytest.raises(AttachmentError, match="carries divprune already"),
    ):
        pipeline("llava_onevision", "quickvideo")


# -- workers that fail -----------------------------------------------------------------------------


class Broken(Exception):
    pass


def failing(chunks: list[Any]) -> Iterator[Any]:
    yield chunks[0]
    raise Broken("the file ends here")


def check_error(read: OverlappedPrefill, stage: str) -> None:
    with pytest.raises(Broken) as caught:
        read.run()
    (note,) = caught.value.__notes__
    assert note == f"while chunk 2 of 4 was at the stage {stage!r}"
    assert not workers() and read.attachment is None
    logits = one_go("llava_onevision")[1]
    with pipeline("llava_onevision") as again:
        again.run()
        got = generated("llava_onevision", again.inputs)[1]
    torch.testing.assert_close(got, logits, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize(("depth", "ahead"), [(0, True), (1, True), (2, True), (2, False)])
def test_a_decoder_that_fails(depth: int, ahead: bool) -> None:
    read = pipeline(
        "llava_onevision", "quickvideo", chunk=2, depth=depth, encode_ahead=ahead, source=failing
    )
    check_error(read, "decode")


@pytest.mark.parametrize(("depth", "ahead"), [(0, True), (1, True), (2, True), (2, False)])
def test_an_encoder_that_fails(depth: int, ahead: bool) -> None:
    seen = []

    def prepare(taken: Any) -> Any:
        seen.append(taken)
        if len(seen) == 2:
            raise Broken("no memory")
        return taken

    check_error(
        pipeline(
            "llava_onevision",
            "quickvideo",
            chunk=2,
            depth=depth,
            encode_ahead=ahead,
            prepare=prepare,
        ),
        "encode",
    )


@pytest.mark.parametrize(("depth", "ahead"), [(0, True), (1, True), (2, True), (2, False)])
def test_a_language_model_that_fails(depth: int, ahead: bool) -> None:
    model = model_of("llava_onevision")
    layer = adapter_for(model).layers(model)[2]
    calls = []

    def fail(module: Any, args: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise Broken("no memory")

    read = pipeline("llava_onevision", "quickvideo", chunk=2, depth=depth, encode_ahead=ahead)
    handle = layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Broken):
            read.run()
    finally:
        handle.remove()
    assert not workers() and read.attachment is None


class Endless:
    """A source that blocks for ever, until it is closed."""

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks, self.given, self.stop = chunks, 0, threading.Event()

    def __iter__(self) -> Endless:
        return self

    def __next__(self) -> Any:
        self.given += 1
        if self.given == 1:
            return self.chunks[0]
        self.stop.wait(WAIT)
        raise StopIteration

    def close(self) -> None:
        self.stop.set()


def test_a_source_that_hangs_ends_in_a_timeout() -> None:
    read = pipeline("llava_onevision", "quickvideo", chunk=2, source=Endless, timeout=0.5)
    with pytest.raises(OverlapTimeoutError, match=r"did not get on for 0.5 s"):
        read.run()
    assert read.chunks.stop.is_set() and not workers() and read.attachment is None


def test_an_interrupt_stops_everything() -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            raise KeyboardInterrupt

    read = pipeline("llava_onevision", "quickvideo", chunk=2, source=Endless, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        read.run()
    assert read.chunks.stop.is_set() and not workers() and read.attachment is None
    read.close()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("count", [3, 5])
def test_a_source_with_too_few_or_too_many_chunks(depth: int, count: int) -> None:
    def source(chunks: list[Any]) -> Iterator[Any]:
        return iter((chunks * 2)[:count])

    read = pipeline("llava_onevision", chunk=2, depth=depth, source=source)
    with pytest.raises(AttachmentError, match=r"4 chunks, 3 came|More than the prompt's 4 chunks"):
        read.run()


# -- overlap ---------------------------------------------------------------------------------------


class Counted:
    """A source that tells when it gave its chunks."""

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks = iter(chunks)
        self.gave = [threading.Event() for _ in chunks]
        self.number = 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> Any:
        chunk = next(self.chunks)
        self.gave[self.number].set()
        self.number += 1
        return chunk


def test_the_decoder_works_ahead_of_a_slow_encoder() -> None:
    ahead = []

    def prepare(taken: Any) -> Any:
        if not ahead:
            # Chunk 0 is being encoded; two may wait and a third may be in the decoder's hands.
            ahead.append(read.chunks.gave[3].wait(WAIT))
        return taken

    read = pipeline("llava_onevision", frames=16, chunk=2, depth=2, source=Counted, prepare=prepare)
    with read:
        read.run()
    assert ahead == [True]


def test_the_encoder_works_ahead_of_a_slow_language_model() -> None:
    prepared = [threading.Event() for _ in range(8)]
    ahead, order = [], iter(range(8))

    def prepare(taken: Any) -> Any:
        prepared[next(order)].set()
        return taken

    def slow(module: Any, args: Any) -> None:
        if not ahead:
            ahead.append(prepared[3].wait(WAIT))

    model = model_of("llava_onevision")
    handle = adapter_for(model).layers(model)[0].register_forward_pre_hook(slow)
    read = pipeline("llava_onevision", frames=16, chunk=2, depth=2, prepare=prepare)
    try:
        with read:
            read.run()
    finally:
        handle.remove()
    assert ahead == [True]
    spans = read.timeline.spans
    first = next(s for s in spans if (s.stage, s.part) == ("prefill", 0))
    later = next(s for s in spans if (s.stage, s.part) == ("encode", 2))
    assert later.start < first.stop and read.timeline.overlap() > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_what_waits_is_bounded(depth: int) -> None:
    wanted = 2 * depth + 2  # all that can be under way while the first is prefilled, less a hand
    ahead = []

    def slow(module: Any, args: Any) -> None:
        if not ahead:
            ahead.append(read.chunks.gave[wanted].wait(WAIT))

    model = model_of("llava_onevision")
    handle = adapter_for(model).layers(model)[0].register_forward_pre_hook(slow)
    read = pipeline("llava_onevision", frames=24, chunk=2, depth=depth, source=Counted)
    try:
        with read:
            read.run()
    finally:
        handle.remove()
    assert ahead == [True], "the buffers are used"
    assert read.most_alive == 2 * depth + 3 < len(read.prompt), "and no more than them"


def test_decoding_runs_ahead_of_an_encoder_in_the_callers_thread() -> None:
    ahead, names = [], []

    def prepare(taken: Any) -> Any:
        names.append(threading.current_thread().name)
        if not ahead:
            ahead.append(read.chunks.gave[3].wait(WAIT))
        return taken

    read = pipeline(
        "llava_onevision",
        "quickvideo",
        frames=16,
        chunk=2,
        source=Counted,
        prepare=prepare,
        encode_ahead=False,
    )
    with read:
        read.run()
    assert ahead == [True] and set(names) == {threading.current_thread().name}
    assert read.most_alive <= 2 + 2
    with pipeline("llava_onevision", "quickvideo", frames=16, chunk=2) as threaded:
        threaded.run()
    for a, b in zip(read.cache.layers, threaded.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys)


def test_who_encodes_depends_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.attach.overlap.cores", lambda: 4)
    for threads, ahead in ((4, False), (1, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert pipeline("llava_onevision", encode_ahead=None).encode_ahead is ahead


def test_without_threads_one_chunk_is_alive() -> None:
    with pipeline("llava_onevision", chunk=2, depth=0) as read:
        read.run()
    assert read.most_alive == 1
    spans = [(span.stage, span.part) for span in read.timeline.spans]
    assert spans == [(s, n) for n in range(4) for s in ("decode", "encode", "prefill")]
    assert read.timeline.overlap() == pytest.approx(0, abs=1e-9)


# -- asking again, and the report ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("recipe", [None, "quickvideo"])
def test_another_question_is_asked_of_the_same_cache(family: str, recipe: str | None) -> None:
    with pipeline(family, recipe) as read:
        read.run()
        first = generated(family, read.inputs)
        inputs = inputs_of(family)
        ids = inputs["input_ids"].clone()
        ids[0, -3:] = torch.tensor([41, 42, 43])
        prompt = ChunkedPrompt.of(model_of(family), {**inputs, "input_ids": ids}, 8, 4)
        other = generated(family, read.inputs_for(prompt))
        again = generated(family, read.inputs_for(read.prompt))
        with pytest.raises(ValueError, match="only what stands behind the video may change"):
            read.inputs_for(dataclasses.replace(prompt, ids_1L=ids.flip(1)))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.allclose(first[1], other[1])


def test_the_report_is_that_of_one_video() -> None:
    with pipeline("llava_onevision", "pool + quickvideo", evidence=True) as read:
        read.run()
    report = read.report
    (item,) = report.items
    assert len(item.grid.planes) == 8 and item.grid.newlines_at_end == 1
    assert item.before == read.prompt.num_visual == item.reduction.num_in
    stages = [(stage.stage, stage.layer) for stage in report.stages]
    assert stages == [("projector", None), *[("cache", layer) for layer in range(4)]]
    assert report.visual_after == item.after < item.before
    text = read.prompt.ids_1L.shape[1] - item.before
    assert report.prompt_lengths == [text + item.after]
    assert report.layer_lengths == [[text + item.after] * 4]
    kept = report.stages[-1].after[0]
    assert report.cache_lengths == [[text + kept] * 4]
    norms = [noted for noted in item.evidence if noted.name == "key norms small"]
    assert len(norms) == 4 and all(noted.value.shape == (item.before,) for noted in norms)
    shown = norms[0].shown
    assert shown[:18].any() and shown[-18:].any(), "of every chunk"
    assert report.flops["reduced"]["total"] < report.flops["untouched"]["total"]
    assert item.pixels is None


def test_merging_reductions_stand_side_by_side() -> None:
    merge = Reduction.merge(torch.tensor([[0, 0, 1, -1]]), num_out=2)
    joined = side_by_side([merge, merge])
    assert joined is not None
    x_BND = torch.randn(1, 8, 3)
    want = torch.cat([merge.apply(x_BND[:, :4]), merge.apply(x_BND[:, 4:])], 1)
    torch.testing.assert_close(joined.apply(x_BND), want)
    assert joined.anchor_BM.tolist() == [[0, 2, 4, 6]]
    assert side_by_side([merge, Reduction.identity(4)]) is None
