"""The task `sequences`: what is planted, what each stage trains, and S5's training parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate import ops
from foveate.methods._s5_training import random_mask, selective_loss
from foveate.models.backbones import ViS4mer
from foveate.training import make_task
from foveate.training.tasks.sequences import MOMENTUM, RETAIN, Sequences, drawn_mask
from foveate.training.tasks.sequences_data import ORDERS, draw_sequences, symbols


def sequences() -> tuple[Sequences, dict[str, torch.nn.Module]]:
    torch.manual_seed(0)
    task = make_task("sequences", "tiny")
    assert isinstance(task, Sequences)
    return task, task.build()


def test_the_order_of_what_is_planted_is_the_label():
    drawn = draw_sequences(np.random.default_rng(0), 60, 512, 32)
    number = drawn.planted.sum(1)
    assert set(number.tolist()) == {3, 4, 5}
    like = drawn.tokens @ symbols(32).T
    for row in range(60):
        found = like[row, drawn.planted[row]].argmax(1).tolist()
        turns = tuple(dict.fromkeys(found))
        assert turns == ORDERS[drawn.label[row]]
        assert [s for turn in turns for s in found if s == turn] == found  # one behind the other
    loudest = np.where(drawn.planted[..., None], 0, drawn.tokens).std()
    assert loudest == pytest.approx(1.0, abs=0.02)


def test_beginners_see_less_noise():
    quiet = draw_sequences(np.random.default_rng(0), 4, 512, 16, noisy=0.0)
    assert (quiet.tokens[~quiet.planted] == 0).all() and (quiet.tokens[quiet.planted] != 0).all()
    some = draw_sequences(np.random.default_rng(0), 4, 512, 16, noisy=0.25)
    assert (some.tokens != 0).any(-1).mean() == pytest.approx(0.25, abs=0.05)


def test_stages_go_on_from_the_first_and_train_what_they_should():
    task, modules = sequences()
    s5, first = modules["s5"], modules["first"]
    assert isinstance(s5, ViS4mer) and isinstance(first, ViS4mer)
    task.begin("s5", modules)
    assert torch.equal(s5.decoder.weight, first.decoder.weight)
    assert s5.mask_generator is not None
    trained = {id(p) for module, _ in task.groups("s5", modules) for p in module.parameters()}
    names = {name for name, p in s5.named_parameters() if id(p) not in trained}
    copies = {name for name in names if "_mom." in name}
    assert copies and names - copies == {"encoder.weight", "encoder.bias"}  # not run at this width
    plain = {id(p) for module, _ in task.groups("s4", modules) for p in module.parameters()}
    assert not plain & {id(p) for p in modules["s4"].mask_generator.parameters()}  # type: ignore[union-attr]


def test_the_copy_is_the_moving_average_of_what_is_trained():
    task, modules = sequences()
    task.begin("s5", modules)
    model = modules["s5"]
    assert isinstance(model, ViS4mer) and model.mask_generator is not None
    copy, layer = model.mask_generator.s4_mom, model.s4_layers[0]
    assert torch.equal(copy.D, layer.D)  # begins as the layer itself
    start, seen = layer.D.detach().clone(), []
    for step in range(4):
        loss, _ = task.loss("s5", modules, task.batch("s5", step))
        loss.backward()
        assert all(p.grad is None for p in copy.parameters())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.sub_(0.1 * parameter.grad)
        seen.append(layer.D.detach().clone())
        task.after_step("s5", modules)
    weights = [(1 - MOMENTUM) * MOMENTUM ** (3 - step) for step in range(4)]
    expected = MOMENTUM**4 * start + sum(w * x for w, x in zip(weights, seen, strict=True))
    torch.testing.assert_close(copy.D, expected)


def test_masks_are_0_and_1_and_reach_the_generator():
    task, modules = sequences()
    model = modules["s5"]
    assert isinstance(model, ViS4mer) and model.mask_generator is not None
    batch = task.batch("s5", 0)
    mask = drawn_mask(model, batch["tokens"], batch["gumbel"])
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    weight = model.mask_generator.linear.weight
    (gradient,) = torch.autograd.grad(model(batch["tokens"], mask).square().sum(), weight)
    assert bool(gradient.abs().sum() > 0)
    again = drawn_mask(model, batch["tokens"], batch["gumbel"])
    assert torch.equal(mask, again)


def test_all_tokens_and_no_ratio_loss_is_the_plain_model():
    task, modules = sequences()
    model, batch = modules["s4"], task.batch("s4", 0)
    full = random_mask(batch["gumbel"][..., 0], 1.0)
    assert torch.equal(model(batch["tokens"], full), model(batch["tokens"]))
    loss, _ = task.loss("s4", modules, batch)
    assert torch.equal(selective_loss(loss, full * 0, RETAIN, weight=0.0), loss)


def test_selective_loss_adds_the_squared_distance_from_the_ratio():
    mask = ops.gumbel_keep(torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]]), noise=torch.zeros(1, 2, 2))
    assert selective_loss(torch.tensor(1.0), mask, 0.25, weight=2.0).item() == 1.125
    with pytest.raises(ValueError, match="weight must not be negative"):
        selective_loss(torch.tensor(1.0), mask, 0.25, weight=-1.0)
    with pytest.raises(ValueError, match="ratio must lie"):
        selective_loss(torch.tensor(1.0), mask, 0.0)


def test_random_masks_keep_as_many_in_every_row():
    mask = random_mask(torch.rand(5, 10, generator=torch.Generator().manual_seed(0)), 0.25)
    assert mask.sum(1).tolist() == [3.0] * 5 and set(mask.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="ratio must lie"):
        random_mask(torch.zeros(1, 2), 1.5)
