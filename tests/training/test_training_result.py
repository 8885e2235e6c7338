"""The finished folder: loads everywhere, and answers as its evaluation says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import LEARNED

from foveate.checkpoints import load_model
from foveate.training import Size, build_model, summary, world_accuracy
from foveate.training.data import AnswerBatches
from foveate.training.evaluate import VIEWS
from foveate.training.packing import encode, packed_hidden, visual_tokens
from foveate.video import Clip
from foveate.view import ask
from foveate.world.vocabulary import TASKS

Learned = tuple[Path, list[tuple], dict[str, Any]]


@pytest.fixture(scope="module")
def loaded(learned: Learned) -> tuple[Any, Any]:
    return load_model(learned[0])


def test_plain_transformers_loads_it(learned: Learned, loaded: tuple[Any, Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(learned[0])
    tokenizer = AutoTokenizer.from_pretrained(learned[0])
    mine, processor = loaded
    assert type(model).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert model.state_dict().keys() == mine.state_dict().keys()
    for name, value in mine.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # The output layer is the embedding, in the file and after loading.
    assert model.lm_head.weight is model.get_input_embeddings().weight
    text = "Where is the red star, at the start?"
    assert tuple(tokenizer(text).input_ids) == encode(text)
    assert tuple(processor.tokenizer(text).input_ids) == encode(text)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what ?"}]}]
    said = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert said.split() == ["<user>", "<video>", "what", "?", "<answer>"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # How it was trained on this machine is nobody else's business.
    assert "eager" not in (learned[0] / "config.json").read_text()


def test_it_answers_as_its_evaluation_says(learned: Learned, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    data = AnswerBatches(LEARNED, seed=0, clips=5, split="test", captions=False)
    batch = data[0]
    with torch.inference_mode():
        hidden = packed_hidden(model, visual_tokens(model, batch["frames"]), batch)
        packed = model.lm_head(hidden[batch["first"]]).argmax(-1).tolist()
    samples = [data.world.sample(index) for index in range(5)]
    asked = [(sample, question) for sample in samples for question in data.asked(sample)]
    assert len(asked) == len(packed) > 20
    counts = {task: [0, 0] for task in TASKS}
    said = []
    for (sample, question), word in zip(asked, packed, strict=True):
        clip = Clip(sample.frames_THWC, fps=sample.fps)
        answer = ask(model, processor, clip, question.text, frames=LEARNED.frames, max_new_tokens=1)
        assert encode(answer.text) == (word,), question
        said.append(answer.text)
        counts[question.task][0] += encode(answer.text)[0] == encode(question.answer)[0]
        counts[question.task][1] += 1
    # Not one word for everything: the comparison would hold for a broken prompt, too.
    assert len(set(said)) > 4
    expected = {task: (right, count) for task, (right, count) in counts.items()}
    assert world_accuracy(model, LEARNED, split="test", clips=5, batch=2) == expected
    assert sum(right for right, _ in expected.values()) > 0


def test_generation_ends_after_the_answer(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    sample = AnswerBatches(LEARNED, seed=0, clips=1, split="test").world.sample(0)
    clip = Clip(sample.frames_THWC, fps=sample.fps)
    answer = ask(model, processor, clip, sample.questions[0].text, frames=4, max_new_tokens=20)
    assert answer.new_tokens < 5 and answer.text


def test_the_card_is_what_the_stored_weights_reach(
    learned: Learned, loaded: tuple[Any, Any]
) -> None:
    card = learned[2]["test"]
    for view, rows in card["accuracy"].items():
        counts = world_accuracy(loaded[0], LEARNED, split="test", clips=card["clips"], view=view)
        assert summary(counts) == rows


# -- views ----------------------------------------------------------------------------------------


def test_one_frame_is_one_of_the_clip_all_the_time() -> None:
    frames = torch.randint(0, 256, (6, 8, 4, 4, 3), dtype=torch.uint8)
    seen = VIEWS["one frame"](frames, "0/test/3")
    assert seen.shape == frames.shape
    chosen = []
    for clip, view in zip(frames, seen, strict=True):
        assert all(torch.equal(frame, view[0]) for frame in view)
        (match,) = [at for at, frame in enumerate(clip) if torch.equal(frame, view[0])]
        chosen.append(match)
    assert len(set(chosen)) > 2
    assert torch.equal(seen, VIEWS["one frame"](frames, "0/test/3"))
    assert not torch.equal(seen, VIEWS["one frame"](frames, "0/test/4"))


def test_blind_sees_grey_and_clip_sees_everything() -> None:
    frames = torch.randint(0, 256, (2, 3, 4, 4, 3), dtype=torch.uint8)
    blind = VIEWS["blind"](frames, "")
    assert blind.shape == frames.shape and blind.dtype == torch.uint8 and (blind == 127).all()
    assert torch.equal(VIEWS["clip"](frames, ""), frames)


def test_only_the_view_of_the_clip_depends_on_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    # Counts with one frame or none stay the same when the other frames are replaced.
    model = build_model(LEARNED, seed=2)
    before = {view: seen(model, monkeypatch, view) for view in VIEWS}

    def scrambled(self: AnswerBatches, step: int) -> dict[str, torch.Tensor]:
        batch = real(self, step)
        return {**batch, "frames": batch["frames"].roll(1, dims=1)}

    real = AnswerBatches.__getitem__
    monkeypatch.setattr(AnswerBatches, "__getitem__", scrambled)
    assert torch.equal(seen(model, monkeypatch, "blind"), before["blind"])
    for view in ("clip", "one frame"):
        assert not torch.equal(seen(model, monkeypatch, view), before[view])


def seen(model: Any, monkeypatch: pytest.MonkeyPatch, view: str) -> torch.Tensor:
    """The visual tokens that an evaluation gives to the language model."""
    from foveate.training import evaluate

    kept: list[torch.Tensor] = []

    def noted(model: Any, frames: torch.Tensor) -> torch.Tensor:
        kept.append(visual_tokens(model, frames))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "visual_tokens", noted)
        world_accuracy(model, LEARNED, clips=4, batch=2, view=view)
    return torch.cat(kept)


def test_every_clip_counts_whatever_the_batch() -> None:
    model = build_model(LEARNED, seed=2).train()
    counts = [world_accuracy(model, LEARNED, clips=7, batch=batch) for batch in (1, 3, 7, 16)]
    assert counts[1:] == counts[:-1]
    assert model.training
    asked = sum(asked for _, asked in counts[0].values())
    data = AnswerBatches(LEARNED, seed=0, clips=1, split="val")
    assert asked == sum(len(data.asked(data.world.sample(index))) for index in range(7))


def test_bad_requests_are_refused() -> None:
    model = build_model(LEARNED)
    with pytest.raises(ValueError, match="unknown view 'sound'; choose one of clip, one frame"):
        world_accuracy(model, LEARNED, view="sound")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        world_accuracy(model, LEARNED, clips=0)


def test_the_summary_counts_questions_not_tasks() -> None:
    counts = {"what": (1, 1), "where": (0, 3), "when": (0, 0)}
    assert summary(counts) == {"overall": 0.25, "what": 1.0, "where": 0.0}
    assert summary({"what": (0, 0)}) == {"overall": 0.0}


# -- sizes ----------------------------------------------------------------------------------------


def test_sizes_are_what_the_documents_say() -> None:
    from foveate.training import SIZES, size_named

    assert [size.visual_tokens for size in SIZES.values()] == [17, 257, 785]
    for name, size in SIZES.items():
        assert size.name == name and size_named(name) is size
        assert size.image % size.patch == 0 and size.vision[0] % size.vision[2] == 0
        width, _, heads, key_value_heads, _ = size.text
        assert width % heads == 0 and heads % key_value_heads == 0 and (width // heads) % 2 == 0
        assert json.loads(json.dumps(size.as_dict())) == size.as_dict()
    with pytest.raises(ValueError, match="unknown size 'huge'; choose one of tiny, small, base"):
        size_named("huge")


@pytest.mark.parametrize("image, side", [(32, 2), (40, 3)])
def test_odd_grids_pool_to_what_the_size_says(image: int, side: int) -> None:
    from dataclasses import replace

    size: Size = replace(LEARNED, image=image)
    assert size.tokens_per_frame == side * side
    frames = torch.from_numpy(np.zeros((1, size.frames, image, image, 3), dtype=np.uint8))
    with torch.inference_mode():
        assert visual_tokens(build_model(size), frames).shape[1] == size.visual_tokens
