"""QTSplus with weights inside models: what enters the language model, and who decides how much."""

from __future__ import annotations

import pytest
import torch
from attach_suite import batch_of, greedy, logits_of, model_of, one_of, same_steps, spied
from safetensors.torch import save_file

import foveate
from foveate.methods._qtsplus_modules import QueryGate
from foveate.models.registry import adapter_for

every_family = pytest.mark.parametrize("family", ("llava_onevision", "qwen3_vl"))


@pytest.fixture
def method(family, tmp_path):
    """A recipe with random weights of the model's width."""
    width = adapter_for(model_of(family)).language_model(model_of(family)).config.hidden_size
    torch.manual_seed(0)
    gate = QueryGate(width, heads=width // 8, kv_heads=1)
    path = tmp_path / "gate.safetensors"
    save_file(gate.state_dict(), path)
    return f"qtsplus(weights={str(path)!r}, head_dim=8)"


@every_family
def test_without_a_budget_the_head_decides(family, method):
    """Between its least and largest share, other than what a budget would leave."""
    model = model_of(family)
    with foveate.reduce(model, method) as run:
        together = greedy(model, batch_of(family))
        shares = [item.after / item.grid.num_patches for item in run.report.items]
        for row in range(3):
            same_steps(together, row, greedy(model, one_of(family, row)))
    assert all(0.05 <= share < 0.6 for share in shares), "newlines come on top"
    with foveate.reduce(model, method, retain=0.8) as run:
        logits_of(model, batch_of(family))
        assert all(item.after >= 0.8 * item.grid.num_patches - 1 for item in run.report.items)


@every_family
def test_reencoded_features_enter(family, method):
    model, inputs = model_of(family), one_of(family)
    entered = []
    for recipe in (method, method.replace(")", ", reencode=False)")):
        with foveate.reduce(model, recipe, retain=0.4) as run, spied(model) as seen:
            logits_of(model, inputs)
        (item,) = run.report.items
        entered.append((seen["inputs_embeds"][0], item))
    (made_SD, item), (was_SD, selected) = entered
    assert item.reduction.anchor_BM.equal(selected.reduction.anchor_BM)
    changed = (made_SD != was_SD).any(1).sum()
    is_patch_M = item.grid.kinds()[item.reduction.anchor_BM[0]] == 0
    assert int(changed) == int(is_patch_M.sum())


@every_family
def test_a_file_that_is_not_there_is_found_when_attaching(family):
    model = model_of(family)
    with pytest.raises(ValueError, match="there is no file"):
        foveate.reduce(model, "qtsplus(weights='gate-that-is-not-there.safetensors')")
    assert torch.isfinite(logits_of(model, one_of(family))).all()
