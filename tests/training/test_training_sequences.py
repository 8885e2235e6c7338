"""The task `sequences`: what is planted, what each stage trains, S5's training parts, LSMCL."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foveate
from foveate import ops
from foveate.methods._s5_training import random_mask, selective_loss
from foveate.methods.s5 import S5
from foveate.models.backbones import ViS4mer
from foveate.training import make_task
from foveate.training.task import Outcome
from foveate.training.tasks.sequences import MOMENTUM, RETAIN, TRIED, Sequences, drawn_mask
from foveate.training.tasks.sequences_clips import Embedder, clips_loss, finds_own, probe
from foveate.training.tasks.sequences_data import (
    ORDERS,
    SYMBOLS,
    directions,
    draw_clips,
    draw_videos,
)
from foveate.training.tasks.sequences_measure import measure


def sequences() -> tuple[Sequences, dict[str, torch.nn.Module]]:
    torch.manual_seed(0)
    task = make_task("sequences", "tiny")
    assert isinstance(task, Sequences)
    return task, task.build()


def test_the_order_of_what_is_planted_is_the_label():
    drawn = draw_videos(np.random.default_rng(0), 60, 32, 16, 32)
    number = drawn.planted.sum(1)
    assert set(number.tolist()) == {3, 4, 5}
    assert (drawn.planted.reshape(60, 32, 16).sum(2) <= 1).all()  # each in a frame of its own
    common, symbols, things = np.split(directions(32), [1, 1 + SYMBOLS])
    like = drawn.tokens @ symbols.T
    for row in range(60):
        planted = drawn.planted[row]
        found = like[row, planted].argmax(1).tolist()
        turns = tuple(dict.fromkeys(found))
        assert turns == ORDERS[drawn.label[row]]
        assert [s for turn in turns for s in found if s == turn] == found  # one behind the other
        assert (drawn.tokens[row, planted] @ things.T).sum(0).argmax() == drawn.thing[row]
    noise = drawn.tokens[~drawn.planted]
    assert noise.std(0).mean() == pytest.approx(1.0, abs=0.02)
    assert abs(noise.mean(0) @ common[0]) == pytest.approx(1.5 * 32**0.5, rel=0.02)


def test_a_clip_is_half_of_its_video_with_other_noise():
    long, short = draw_clips(np.random.default_rng(0), 40, 8, 16, 32)
    assert short.shape == (40, 64, 32)
    # Planted tokens are what both have in common: as near as two draws of noise are.
    for row in range(40):
        halves = np.split(long.tokens[row], 2)
        first, second = np.split(long.planted[row], 2)
        late = second.sum() > first.sum()
        shown = (halves[int(late)] * short[row]).sum(1)[second if late else first]
        assert len(shown) >= 2 and shown.min() > 4 * 32
        apart = (halves[int(late)] - short[row]).std()
        assert apart == pytest.approx(2**0.5, abs=0.1)


def test_stages_go_on_from_the_one_before_and_train_what_they_should():
    task, modules = sequences()
    s5, first = modules["s5"], modules["first"]
    assert isinstance(s5, ViS4mer) and isinstance(first, ViS4mer)
    task.begin("s5", modules)
    assert torch.equal(s5.decoder.weight, first.decoder.weight)
    assert s5.mask_generator is not None
    trained = {id(p) for module, _ in task.groups("s5", modules) for p in module.parameters()}
    names = {name for name, p in s5.named_parameters() if id(p) not in trained}
    copies = {name for name in names if "_mom." in name}
    # The encoder does not run at this width; the rates of the states stay as they begin.
    rates = {f"s4_layers.{i}.kernel.{name}" for i in (0, 1) for name in ("log_A_real", "A_imag")}
    assert copies and names - copies == {"encoder.weight", "encoder.bias", *rates}
    for name in ("s4", "zero", "gather"):
        plain = {id(p) for module, _ in task.groups(name, modules) for p in module.parameters()}
        generator = modules[name].mask_generator
        assert not plain & {id(p) for p in generator.parameters()}  # type: ignore[union-attr]
    with torch.no_grad():
        s5.decoder.weight.fill_(3.0)
    task.begin("gather", modules)
    assert torch.equal(modules["gather"].decoder.weight, s5.decoder.weight)  # type: ignore[union-attr]


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


def test_a_token_that_a_mask_drops_still_says_what_it_would_have_been():
    """Through the first layer too, and not through the residual stream alone."""
    task, modules = sequences()
    model, batch = modules["s5"], task.batch("s5", 0)
    assert isinstance(model, ViS4mer)
    tokens = batch["tokens"]
    mask = torch.ones(tokens.shape[:2])
    mask[:, 5] = 0.0
    other = tokens.clone()
    other[:, 5] += torch.randn(tokens.shape[2])

    def gradient(x: torch.Tensor) -> torch.Tensor:
        given = mask.clone().requires_grad_(True)
        z = model.norms[0](x) * given[..., None]
        # What `ViS4mer` does in front of its first layer.
        seen: list[torch.Tensor] = []
        hook = model.s4_layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(x, given)
        hook.remove()
        torch.testing.assert_close(seen[0], z.transpose(1, 2))
        weight = torch.linspace(-1, 1, x.shape[2])[None, :, None]
        return torch.autograd.grad((seen[0] * weight).sum(), given)[0]

    assert not torch.allclose(gradient(tokens)[:, 5], gradient(other)[:, 5])
    assert torch.allclose(gradient(tokens)[:, 6], gradient(other)[:, 6])
    assert torch.equal(model(tokens, mask), model(other, mask))


@pytest.mark.parametrize("form", ["zero", "gather"])
def test_kept_tokens_train_the_decoder_through_the_attachment(form):
    task, modules = sequences()
    task.begin(form, modules)
    model, batch = modules[form], task.batch(form, 0)
    with foveate.reduce(model, S5(form), retain=RETAIN):
        expected = model(batch["tokens"])
    loss, _ = task.loss(form, modules, batch)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected, batch["label"]))
    loss.backward()
    assert all(
        bool(p.grad.ne(0).any())
        for module, _ in task.groups(form, modules)
        for p in module.parameters()
    )


def test_forms_go_on_with_the_videos_behind_those_of_the_masks():
    task, _ = sequences()
    stages = make_task("sequences", "small").stages
    assert stages["s4"].steps == stages["s5"].steps + stages["zero"].steps
    steps = task.stages["s5"].steps
    for form in ("zero", "gather"):
        assert torch.equal(task.batch(form, 0)["tokens"], task.batch("s4", steps)["tokens"])


def test_the_generator_begins_with_most_tokens_and_centred_features():
    task, modules = sequences()
    task.begin("s5", modules)
    model = modules["s5"]
    assert isinstance(model, ViS4mer) and model.mask_generator is not None
    tokens = task.batch("s5", 0)["tokens"]
    seen: list[torch.Tensor] = []
    model.mask_generator.linear.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits = model.keep_logits(tokens)
    assert logits is not None
    torch.testing.assert_close(seen[0].mean((0, 1)), torch.zeros(16), atol=1e-5, rtol=0.0)
    assert logits.softmax(-1)[..., 0].mean().item() == pytest.approx(0.9, abs=0.02)


def test_clips_train_one_network_and_the_other_follows():
    task, modules = sequences()
    task.begin("lsmcl", modules)
    fast, slow = modules["lsmcl"], modules["slow"]
    assert isinstance(fast, Embedder) and isinstance(slow, Embedder)
    assert torch.equal(fast.projector[0].weight, modules["untrained"].projector[0].weight)  # type: ignore[union-attr, index]
    start = slow.body.s4_layers[0].D.detach().clone()
    loss, _ = task.loss("lsmcl", modules, task.batch("lsmcl", 0))
    loss.backward()
    assert all(p.grad is None for p in slow.parameters())
    trained = [p for module, _ in task.groups("lsmcl", modules) for p in module.parameters()]
    assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in trained)
    with torch.no_grad():
        fast.body.s4_layers[0].D.add_(1.0)  # type: ignore[operator]
    task.after_step("lsmcl", modules)
    torch.testing.assert_close(slow.body.s4_layers[0].D, start + (1 - MOMENTUM))


def test_masks_of_clips_keep_three_quarters():
    task, _ = sequences()
    batch = task.batch("lsmcl", 0)
    shares = []

    class Counts(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            shares.append(mask.mean(1))
            return (x * mask[..., None]).mean(1)

    loss, found = clips_loss(Counts(), Counts(), torch.nn.Identity(), batch)
    assert loss.isfinite() and 0 <= found <= 1
    assert all(bool((share == 0.75).all()) for share in shares) and len(shares) == 2


def test_a_clip_finds_its_own_only_where_no_other_is_as_near():
    embedding = torch.eye(3)
    assert finds_own(embedding, embedding).tolist() == [1.0, 1.0, 1.0]
    assert finds_own(embedding, embedding[[0, 2, 1]]).tolist() == [1.0, 0.0, 0.0]
    assert finds_own(embedding, torch.ones(3, 3)).tolist() == [0.0, 0.0, 0.0]


def test_a_probe_is_a_linear_fit_of_what_it_was_given():
    draw = torch.Generator().manual_seed(0)
    feature = torch.randn(400, 5, generator=draw)
    label = (feature[:, :3] * torch.tensor([1.0, 2.0, 3.0])).argmax(1)
    twice = torch.cat([feature, feature[:, :1]], 1)  # dependent features are no harm
    right = (probe(twice[:300], label[:300], twice[300:], 3) == label[300:]).float().mean()
    chance = (probe(twice[:300], label[:300], twice[300:].flip(0), 3) == label[300:]).float()
    assert right > 0.8 and chance.mean() < 0.6


def test_what_is_asked_is_compared_on_the_same_videos():
    task, modules = sequences()
    for module in modules.values():
        module.eval()
    # Gathered in the same way from the same weights, and S5's masks on an untrained generator.
    with torch.inference_mode():
        rows = measure(task, modules, lambda *_: None, TRIED)
        again = measure(task, modules, lambda *_: None, TRIED)
    assert rows == again and all(isinstance(row, Outcome) for row in rows)
    kept = {row.recipe: row.value for row in rows if row.metric == "planted tokens kept (%)"}
    assert set(kept) == {f's5(form="zero", retain={RETAIN})', f"{RETAIN} kept at random"}
    asked = [row for row in rows if row.bar]
    assert len(asked) == 7 and all(row.met is not None for row in asked)
