"""A packed row gives what asking one question at a time gives, through the ordinary forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from foveate.training import SIZES, build_model
from foveate.training.data import AnswerBatches
from foveate.training.model import IDS, normalise
from foveate.training.packing import (
    Exchange,
    encode,
    exchange,
    pack,
    packed_hidden,
    packed_mask,
    visual_tokens,
)
from foveate.world.tokenizer import ANSWER, END, PAD, USER, VIDEO, VOCABULARY

SIZE = replace(SIZES["tiny"], text=(32, 3, 4, 2, 64), vision=(32, 2, 2, 64))


@pytest.fixture(scope="module")
def model() -> Any:
    found = build_model(SIZE, seed=3).eval()
    with torch.no_grad():
        # The closing token is drawn near zero; it has to matter here.
        found.model.image_newline.copy_(torch.linspace(-1, 1, SIZE.text[0]))
    return found


def frames(clips: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (clips, SIZE.frames, SIZE.image, SIZE.image, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_the_layout_of_a_row() -> None:
    batch = pack([[Exchange((50, 51), (60,)), Exchange((52,), (61, 62), 0.3)], []], 3)
    user, video, answer, end = (IDS[name] for name in (USER, VIDEO, ANSWER, END))
    assert batch["ids"].tolist() == [
        [user, video, video, video, 50, 51, answer, 60, 52, answer, 61, 62],
        [user, video, video, video, *[IDS[PAD]] * 8],
    ]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert batch["segments"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0] * 4 + [-1] * 8]
    none = -100
    assert batch["labels"][0].tolist() == [none] * 6 + [60, end] + [none, 61, 62, end]
    assert (batch["labels"][1] == none).all()
    assert batch["first"][0].nonzero().flatten().tolist() == [6, 9]
    assert batch["weights"][0].tolist() == pytest.approx([0] * 4 + [1] * 4 + [0.3] * 4)


def test_who_may_look_at_whom() -> None:
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].long().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        # A row of padding sees something, or its softmax would be undefined.
        [1, 1, 0, 0, 0, 1],
    ]


def test_packed_equals_one_at_a_time(model: Any) -> None:
    rows = [
        [exchange("what color is the star ?", "red"), exchange("where is it ?", "top left")],
        [exchange("describe the clip .", "a red star moves left and a big blue ring stays", 0.3)],
        [
            exchange("how many objects are there ?", "three"),
            exchange("what is the number on the sign ?", "7"),
            exchange("is it still ?", "no"),
        ],
    ]
    pixels = frames(len(rows))
    batch = pack(rows, SIZE.visual_tokens)
    assert (batch["segments"] == -1).any()
    with torch.inference_mode():
        packed = model.lm_head(packed_hidden(model, visual_tokens(model, pixels), batch))
        for row, exchanges in enumerate(rows):
            for number, one in enumerate(exchanges, start=1):
                start = [IDS[USER], *[IDS[VIDEO]] * SIZE.visual_tokens]
                ids = torch.tensor([[*start, *one.question, IDS[ANSWER], *one.answer]])
                alone = model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values_videos=normalise(pixels[row : row + 1]),
                ).logits[0, len(start) :]
                mine = batch["segments"][row] == number
                torch.testing.assert_close(packed[row][mine], alone, atol=1e-5, rtol=1e-4)
                assert batch["labels"][row][mine][-1] == IDS[END]


def test_a_question_does_not_see_its_neighbours(model: Any) -> None:
    mine, other = exchange("what color is the star ?", "red"), exchange("what is new ?", "ring")
    pixels = frames(1)
    with torch.inference_mode():
        seen = visual_tokens(model, pixels)
        hidden = [
            packed_hidden(model, seen, pack([row], SIZE.visual_tokens))[0]
            for row in ([mine], [mine, other], [other, mine])
        ]
    length = len(hidden[0]) - 1 - SIZE.visual_tokens
    first = hidden[0][-length:]
    torch.testing.assert_close(hidden[1][1 + SIZE.visual_tokens :][:length], first)
    torch.testing.assert_close(hidden[2][-length:], first)


def test_visual_tokens_are_those_of_the_model(model: Any) -> None:
    pixels = frames(2)
    with torch.inference_mode():
        mine = visual_tokens(model, pixels)
        theirs = model.get_video_features(normalise(pixels)).pooler_output
    assert mine.shape == (2, SIZE.visual_tokens, SIZE.text[0])
    # transformers 5.16 joins the closing token to them later.
    assert theirs.shape[1] in (SIZE.visual_tokens - 1, SIZE.visual_tokens)
    torch.testing.assert_close(mine[:, : theirs.shape[1]], theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(mine[1, -1], model.model.image_newline)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_gets_no_gradient_but_the_projector_does(model: Any, frozen: bool) -> None:
    model.zero_grad()
    visual_tokens(model, frames(1), frozen=frozen).square().sum().backward()
    tower = [p.grad for p in model.model.vision_tower.encoder.parameters()]
    assert all((grad is None) == frozen for grad in tower)
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    model.zero_grad()


def test_batches_ask_what_the_world_asks() -> None:
    data = AnswerBatches(SIZE, seed=0, clips=3, first=5)
    batch = data[2]
    samples = [data.world.sample(index) for index in (11, 12, 13)]
    for row, sample in enumerate(samples):
        assert torch.equal(batch["frames"][row], torch.from_numpy(sample.frames_THWC))
        said = batch["labels"][row][batch["first"][row]].tolist()
        asked = data.asked(sample)
        answers = [encode(question.answer)[0] for question in asked]
        assert said[: len(asked)] == answers and len(said) == len(asked) + 1
        # The last exchange is the caption, at a lower weight.
        last = batch["segments"][row] == len(asked) + 1
        caption = batch["labels"][row][last]
        words = " ".join(VOCABULARY[token] for token in caption[caption >= 0][:-1])
        assert encode(words) == encode(sample.caption)
        assert 0 < batch["weights"][row][last].max() < 1
    assert not torch.equal(data[3]["frames"], batch["frames"])


def test_every_word_of_the_world_has_a_token() -> None:
    unknown = VOCABULARY.index("<unk>")
    data = AnswerBatches(replace(SIZE, frames=16), seed=1, clips=1)
    for index in range(200):
        sample = data.world.sample(index)
        texts = [text for q in sample.questions for text in (q.text, q.answer, *q.options)]
        for text in [*texts, sample.caption]:
            assert unknown not in encode(text), text
