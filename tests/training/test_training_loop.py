"""The loop alone, on a model of two numbers: rates, groups, checkpoints, broken steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import SHORT, Killed, training

from foveate.errors import FoveateError, TrainingError
from foveate.training import Stage, build_model
from foveate.training.dense import DenseHeads
from foveate.training.embedded import STAGES
from foveate.training.loop import Run, make_optimisers, rate_at


def quiet(*facts: object) -> None:
    pass


def data(steps: range) -> Iterator[dict[str, Any]]:
    """Points whose targets depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        yield {"x": torch.randn(8, 3, generator=generator)}


def make_run(folder: Path, steps: int = 30, **options: Any) -> tuple[Run, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss(batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        off = model(batch["x"]) - batch["x"][:, :2]
        return off.square().mean(), {"off": off.abs().max()}

    stage = Stage(steps, 1, 0.05, warmup=5)
    optimisers = make_optimisers([(model, 1.0)], stage.rate)
    settings = {"every": 7, "report_every": 5, **options}
    return Run("toy", stage, {"model": model}, optimisers, loss, folder, **settings), model


# -- rates and groups -----------------------------------------------------------------------------


def test_rates_rise_in_a_line_and_fall_in_a_cosine() -> None:
    stage = Stage(steps=110, clips=1, rate=1.0, warmup=10)
    rates = [rate_at(stage, step) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[35] == pytest.approx(0.05 + 0.95 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.05 < rates[-1] < 0.051


def test_a_warm_up_may_fill_the_stage_or_be_left_out() -> None:
    assert [rate_at(Stage(2, 1, 1.0, warmup=2), step) for step in range(2)] == [0.5, 1.0]
    assert rate_at(Stage(5, 1, 1.0, warmup=0), 0) == 1.0


def test_a_stage_may_stop_before_its_cosine_does() -> None:
    whole = Stage(steps=110, clips=1, rate=1.0, warmup=10)
    part = Stage(steps=60, clips=1, rate=1.0, warmup=10, horizon=110)
    assert [rate_at(part, s) for s in range(60)] == [rate_at(whole, s) for s in range(60)]


def prepared(stage: str, folder: Path) -> tuple[Any, DenseHeads, Run]:
    model = build_model(SHORT)
    heads = DenseHeads(SHORT.vision[0], SHORT.text[0])
    return model, heads, training(folder)._prepare(stage, model, heads)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_what_it_should_and_nothing_twice(stage: str, tmp_path: Path) -> None:
    model, heads, run = prepared(stage, tmp_path)
    inner = model.model
    taken = [p for o in run.optimisers for group in o.param_groups for p in group["params"]]
    assert len(taken) == len({id(p) for p in taken})
    tower, rest = inner.vision_tower, [inner.language_model, inner.multi_modal_projector]
    expected = {
        "tower": [tower, inner.multi_modal_projector, heads],
        "answers": rest,
        "joint": [*rest, tower, heads],
    }[stage]
    wanted = {id(p) for module in expected for p in module.parameters()}
    if stage != "tower":
        wanted.add(id(inner.image_newline))
    assert {id(p) for p in taken} == wanted
    # Frozen is frozen: no gradient is even computed.
    assert all(p.requires_grad == (stage != "answers") for p in tower.parameters())
    if stage == "joint":
        # The output layer is tied to the embedding, so nothing of the model is left out.
        assert wanted == {id(p) for module in (model, heads) for p in module.parameters()}


def test_muon_gets_the_matrices_and_adam_the_rest(tmp_path: Path) -> None:
    model, heads, run = prepared("joint", tmp_path)
    muon, adam = run.optimisers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adam, torch.optim.AdamW)
    named = [*model.named_parameters(), *heads.named_parameters()]
    names = {id(p): name for name, p in named}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    assert len(tables) == 2
    for optimiser in (muon, adam):
        for parameter in (p for g in optimiser.param_groups for p in g["params"]):
            is_matrix = parameter.ndim == 2 and id(parameter) not in tables
            assert is_matrix == (optimiser is muon), names[id(parameter)]


def test_every_part_has_its_share_of_the_rate(tmp_path: Path) -> None:
    model, _, run = prepared("joint", tmp_path)
    run._set_rate(0.5)
    shares = {}
    for group in (g for o in run.optimisers for g in o.param_groups):
        for parameter in group["params"]:
            shares[id(parameter)] = group["lr"] / run.stage.rate
    inner = model.model
    parts = {inner.language_model: 1.0, inner.multi_modal_projector: 0.5, inner.vision_tower: 1.0}
    for module, share in parts.items():
        for parameter in module.parameters():
            assert shares[id(parameter)] == pytest.approx(share / 2)
    assert shares[id(inner.image_newline)] == pytest.approx(0.5)


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [1, 6, 7, 8, 20, 29])
def test_a_run_that_is_killed_at_a_step_ends_the_same(tmp_path: Path, kill: int) -> None:
    whole, model = make_run(tmp_path / "whole")
    whole.folder.mkdir()
    whole.train(data, quiet)

    def killed(steps: range) -> Iterator[dict[str, Any]]:
        for step, batch in zip(steps, data(steps), strict=True):
            if step == kill:
                raise Killed
            yield batch

    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.raises(Killed):
        make_run(folder)[0].train(killed, quiet)
    resumed, again = make_run(folder)
    told: list[tuple] = []
    resumed.train(data, lambda *facts: told.append(facts))
    assert told[0] == ("toy", kill // 7 * 7, 30, {})
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    curves = [[(p["step"], p["loss"]) for p in run.history] for run in (whole, resumed)]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [5, 7, 10, 14, 15, 20, 21, 25, 28, 30]


def test_the_reported_loss_is_the_mean_since_the_last_report(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, every=1000)
    seen: list[float] = []
    inner = run.loss

    def noted(batch: dict[str, Any]) -> Any:
        loss, facts = inner(batch)
        seen.append(float(loss.detach()))
        return loss, facts

    run.loss = noted
    run.train(data, quiet)
    means = [sum(seen[at : at + 5]) / 5 for at in range(0, 30, 5)]
    assert [point["loss"] for point in run.history] == pytest.approx(means)
    seconds = [point["seconds"] for point in run.history]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_finished_stage_is_neither_repeated_nor_fed(tmp_path: Path) -> None:
    run, model = make_run(tmp_path)
    run.train(data, quiet)
    again, untrained = make_run(tmp_path)
    told: list[tuple] = []

    def refuse(steps: range) -> Iterator[dict[str, Any]]:
        raise AssertionError("a finished stage asked for data")

    again.train(refuse, lambda *facts: told.append(facts))
    assert told == [("toy", 30, 30, {})]
    assert torch.equal(untrained.weight, model.weight)
    assert again.history == run.history and again.seconds == run.seconds


def test_a_kill_while_writing_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = make_run(tmp_path / "whole")
    whole.folder.mkdir()
    whole.train(data, quiet)
    folder = tmp_path / "killed"
    folder.mkdir()
    run, _ = make_run(folder)
    real = torch.save

    def half(state: dict[str, Any], file: Path) -> None:
        real(state, file)
        if state["step"] == 14:
            file.write_bytes(file.read_bytes()[:100])
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            run.train(data, quiet)
    resumed, again = make_run(folder)
    assert resumed.load() == 7
    resumed.train(data, quiet)
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)


# -- broken steps ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)

    def broken(steps: range) -> Iterator[dict[str, Any]]:
        for step, batch in zip(steps, data(steps), strict=True):
            yield {"x": batch["x"] * (math.nan if step == 12 else 1)}

    with pytest.raises(TrainingError, match=r"loss of stage 'toy' is nan by step 14.*0\.05") as got:
        run.train(broken, quiet)
    assert isinstance(got.value, FoveateError)
    again, model = make_run(tmp_path)
    # The last report before it was at step 10, the last checkpoint at step 7.
    assert again.load() == 7 and torch.isfinite(model.weight).all()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    run, model = make_run(tmp_path, every=5)
    inner = run.loss

    def edged(batch: dict[str, Any]) -> Any:
        loss, facts = inner(batch)
        if batch["last"]:
            # The root of zero is finite, its slope is not.
            loss = loss + (model.weight * 0).square().sum().sqrt()
        return loss, facts

    def marked(steps: range) -> Iterator[dict[str, Any]]:
        for step, batch in zip(steps, data(steps), strict=True):
            yield {**batch, "last": step == 4}

    run.loss = edged
    with pytest.raises(TrainingError, match="gradient of stage 'toy' is nan by step 5"):
        run.train(marked, quiet)
    assert not run.file.exists()
