"""Methods on backbones of their own: the properties of the shared suite, and forwards by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attach_suite import assert_same, snapshot
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate import ops
from foveate.errors import AttachmentError
from foveate.methods.hot import choose_frames
from foveate.models.backbones import (
    MixSTE,
    MixSTEConfig,
    ViS4mer,
    ViS4merConfig,
    VisionMamba,
    VisionMambaConfig,
)


def mixste(**options: Any) -> nn.Module:
    return MixSTE(MixSTEConfig(frames=18, joints=5, hidden=16, pairs=4, heads=2, **options))


def mamba(**options: Any) -> nn.Module:
    return VisionMamba(VisionMambaConfig(32, 4, depth=6, hidden=16, classes=5, **options))


def vis4mer(**options: Any) -> nn.Module:
    options = {"mask_generator": True, **options}
    return ViS4mer(ViS4merConfig(8, 16, blocks=2, state=6, classes=5, **options))


@dataclass(frozen=True)
class Case:
    """A recipe on a backbone.

    Attributes:
        recipe: text.
        make: the model.
        shape: of one sample.
        tokens: of a sample, what no method drops left out.
        kept: at `retain`.
        retain: the budget.
    """

    recipe: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int
    kept: int
    retain: float = 0.5

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "A_" not in name and "dt" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
        return model

    def input(self, batch: int = 3) -> torch.Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(2))

    def attach(self, model: nn.Module, **options: Any) -> foveate.Attachment:
        return foveate.reduce(model, self.recipe, **{"retain": self.retain, **options})


POSES, IMAGES, VIDEO = (18, 5, 2), (3, 32, 32), (37, 8)
CASES = {
    "hot": Case("hot", mixste, POSES, 18, 9),
    "hot-trained": Case("hot", lambda: mixste(slots=9), POSES, 18, 9),
    "hot-interpolated": Case('hot(recovery="interpolate")', lambda: mixste(slots=9), POSES, 18, 9),
    "hot-jitter": Case("hot(jitter=True)", mixste, POSES, 18, 9),
    "hot-centre": Case('hot(variant="seq2frame")', mixste, POSES, 18, 9),
    "tovim": Case("tovim", mamba, IMAGES, 64, 32),
    "tovim-naive": Case("tovim(align=False)", mamba, IMAGES, 64, 32),
    "tovim-paths": Case("tovim", lambda: mamba(paths=4, pool="mean"), IMAGES, 64, 32),
    "s5": Case("s5", vis4mer, VIDEO, 37, 19),
    "s5-zero": Case('s5(form="zero")', vis4mer, VIDEO, 37, 19),
    "s5-recurrent": Case("s5", lambda: vis4mer(recurrent=True), VIDEO, 37, 19),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


@EVERY
def test_keeping_all_is_the_untouched_model(case):
    model, x = case.model(), case.input()
    expected = run_of(model, x)
    with case.attach(model, retain=1.0) as run:
        assert not run.active
        assert torch.equal(run_of(model, x), expected)
        assert not run.report.stages


@EVERY
def test_the_method_acts_and_what_it_counts_is_what_is_left(case):
    model, x = case.model(), case.input()
    expected = run_of(model, x)
    with case.attach(model) as run:
        found = run_of(model, x)
        report, reduction = run.report, run.encoder_reduction
    if "seq2frame" in case.recipe:
        assert found.shape[1] == case.kept
    else:
        assert found.shape == expected.shape and not torch.allclose(found, expected)
    assert reduction is not None and reduction.kind == "select"
    others = reduction.num_in - case.tokens  # [CLS]
    assert reduction.num_out - others == case.kept
    assert report.stages[-1].after == (case.kept + others,) * 3
    assert report.stages[0].before == (case.tokens + others,) * 3
    assert [s.layer for s in report.stages] == sorted(s.layer for s in report.stages)
    assert report.flops["untouched"]["encoder"] > 0
    anchors = reduction.anchor_BM
    assert all(len(set(row)) == len(row) for row in anchors.tolist())
    if "zero" not in case.recipe:
        assert report.block_lengths[0] >= report.block_lengths[-1]
        assert report.stages[-1].after[0] in report.block_lengths


@EVERY
def test_a_batch_is_its_samples(case):
    model, x = case.model(), case.input()
    with case.attach(model) as run:
        together = run_of(model, x)
        anchors = run.encoder_reduction.anchor_BM
        for row in range(3):
            alone = run_of(model, x[row : row + 1])
            if "jitter" in case.recipe:  # noise goes by the place in the batch
                continue
            assert torch.equal(run.encoder_reduction.anchor_BM[0], anchors[row])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


@EVERY
def test_twice_is_the_same(case):
    model, x = case.model(), case.input()
    with case.attach(model):
        assert torch.equal(run_of(model, x), run_of(model, x))


@EVERY
def test_half_precision(case):
    model, x = case.model().bfloat16(), case.input().bfloat16()
    with case.attach(model) as run:
        found = run_of(model, x)
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
    others = run.encoder_reduction.num_in - case.tokens
    assert run.encoder_reduction.num_out - others == case.kept


@EVERY
def test_removal_restores_everything(case):
    model, x = case.model(), case.input()
    expected, before = run_of(model, x), snapshot(model)
    state = dict(model.state_dict(keep_vars=True))
    run = case.attach(model)
    run_of(model, x)
    with pytest.raises(AttachmentError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(AttachmentError, match="already"):
        case.attach(model)
    run.remove()
    run.remove()
    assert_same(before, snapshot(model))
    assert all(model.state_dict(keep_vars=True)[key] is value for key, value in state.items())
    assert torch.equal(run_of(model, x), expected)


@EVERY
def test_a_call_that_fails_leaves_nothing_behind(case):
    model, x = case.model(), case.input()
    with case.attach(model) as run:
        expected = run_of(model, x)
        with pytest.raises(ValueError, match="takes"):
            model(x[..., :1])
        assert torch.equal(run_of(model, x), expected)
        run.budget = 1.0
        full = run_of(model, x)
    assert torch.equal(full, run_of(model, x))


@EVERY
def test_evidence_is_of_every_token_and_changes_nothing(case):
    model, x = case.model(), case.input()
    with case.attach(model) as run:
        expected = run_of(model, x)
        assert not run.report.items
    with case.attach(model, evidence=True) as run:
        assert torch.equal(run_of(model, x), expected)
        items, reduction = run.report.items, run.encoder_reduction
    assert len(items) == 3
    for row, item in enumerate(items):
        assert item.grid.num_tokens == case.tokens and item.after == case.kept
        assert item.evidence
        for noted in item.evidence:
            assert noted.value.shape == (case.tokens,) and noted.shown.any()
        if reduction.num_in == case.tokens:
            kept = reduction.anchor_BM[row].tolist()
            assert item.reduction.anchor_BM[0].tolist() == sorted(kept)


@EVERY
def test_flops_of_the_report_are_the_rule_at_these_lengths(case):
    model, x = case.model(), case.input()
    with case.attach(model) as run:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run_of(model, x)
        flops = {name: parts["encoder"] for name, parts in run.report.flops.items()}
        lengths = run.report.block_lengths
    if isinstance(model, MixSTE):
        # Nothing but matrix products, so the counter sees all of it; and the choice beside.
        choice = 2 * 3 * 18 * 18 * 16
        assert flops["reduced"] == counter.get_total_flops() - choice
    elif isinstance(model, VisionMamba):
        unseen = 3 * sum(lengths) * model.config.paths * 4 * 32 * 16
        assert flops["reduced"] == counter.get_total_flops() + unseen
        assert flops["reduced"] < flops["untouched"]
    else:
        assert flops["reduced"] > counter.get_total_flops()  # transforms are not seen


@pytest.mark.parametrize("name", ["hot", "tovim", "s5"])
def test_other_models_are_refused(name):
    for case in CASES.values():
        if case.recipe.partition("(")[0] == name:
            continue
        model = case.model()
        before = snapshot(model)
        with pytest.raises(AttachmentError, match=f"{name} runs on"):
            foveate.reduce(model, name)
        assert_same(before, snapshot(model))


def test_methods_of_vision_transformers_are_refused():
    with pytest.raises(AttachmentError, match="tome acts on vision transformers"):
        foveate.reduce(CASES["hot"].model(), "tome")
    with pytest.raises(AttachmentError, match="one value"):
        foveate.reduce(CASES["hot"].model(), "hot", retain=[0.5, 0.3])


# -- HoT ------------------------------------------------------------------------------------------


def hot_by_hand(model: nn.Module, x: torch.Tensor, keep: int, layer: int) -> torch.Tensor:
    """The released forward, from its description, with loops over joints and frames."""
    F, J = x.shape[1:3]
    x = model.Spatial_patch_to_embedding(x) + model.Spatial_pos_embed
    for i in range(4):
        if i == layer:
            index = choose_frames(x.mean(2), keep)
            x = torch.stack([x[b, index[b]] for b in range(len(x))])
            x = x + model.pos_embed_token[:, :, None]
        joints = [model.Spatial_norm(model.STEblocks[i](x[:, t])) for t in range(x.shape[1])]
        x = torch.stack(joints, 1)
        if i == 0:
            x = x + model.Temporal_pos_embed[0][:, None]
        x = torch.stack([model.Temporal_norm(model.TTEblocks[i](x[:, :, j])) for j in range(J)], 2)
    weights = dict(model.cross_attention.named_parameters())
    queries = model.x_token.expand(len(x), F, -1)
    found = [queries + ops.cross_attention(queries, x[:, :, j], weights, 2) for j in range(J)]
    return model.head(torch.stack(found, 2))


def test_hot_with_trained_parts_is_the_released_forward():
    case = CASES["hot-trained"]
    model, x = case.model(), case.input()
    with case.attach(model):
        found = run_of(model, x)
    with torch.no_grad():
        expected = hot_by_hand(model, x, 9, 2)  # 3/8 of four pairs, rounded
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hot_wants_as_many_frames_as_it_was_trained_for():
    case = CASES["hot-trained"]
    model, x = case.model(), case.input()
    with case.attach(model, retain=1 / 3), pytest.raises(ValueError, match="keep 9 frames"):
        run_of(model, x)
    with foveate.reduce(model, 'hot(recovery="interpolate")', retain=1 / 3):
        assert run_of(model, x).shape == (3, 18, 5, 3)
    bare = CASES["hot"].model()
    with (
        foveate.reduce(bare, 'hot(recovery="attention")'),
        pytest.raises(ValueError, match="needs a model with trained parts"),
    ):
        run_of(bare, x)


def test_hot_without_training_interpolates_between_kept_frames():
    case = CASES["hot"]
    model, x = case.model(), case.input()
    seen: list[torch.Tensor] = []
    with case.attach(model) as run:
        handle = model.head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        run_of(model, x)
        handle.remove()
        kept = run.encoder_reduction.anchor_BM
    full = seen[0]
    between = full[:, 1:-1] - (full[:, :-2] + full[:, 2:]) / 2  # zero where time is straight
    straight = between.abs().amax((2, 3)) < 1e-5
    is_kept = torch.zeros(3, 18, dtype=torch.bool).scatter(1, kept, True)
    assert bool(straight[~is_kept[:, 1:-1]].all())
    assert not bool(straight[is_kept[:, 1:-1]].all())


def test_hot_for_one_frame_keeps_the_centre_and_gives_what_is_left():
    case = CASES["hot-centre"]
    model, x = case.model(), case.input()
    with case.attach(model) as run:
        found = run_of(model, x)
        kept = run.encoder_reduction.anchor_BM
    assert found.shape == (3, 9, 5, 3)
    assert bool((kept == 8).any(1).all()) and bool((kept.diff(dim=1) > 0).all())


# -- ToP-ViM --------------------------------------------------------------------------------------


def test_cls_stays_in_the_middle_and_is_what_the_head_reads():
    case = CASES["tovim"]
    model, x = case.model(), case.input()
    with case.attach(model) as run:
        out = model(x)
        anchors = run.encoder_reduction.anchor_BM
    assert anchors.shape[1] % 2 == 1
    assert bool((anchors[:, anchors.shape[1] // 2] == 32).all())
    patches = anchors[anchors != 32].view(3, -1)
    assert bool((patches.diff(dim=1) > 0).all())
    assert torch.equal(out.logits, model.head(out.last_hidden_state[:, anchors.shape[1] // 2]))


def test_dense_features_come_back_at_full_length():
    case = CASES["tovim"]
    model, x = case.model(), case.input()
    with torch.no_grad():
        with case.attach(model) as run:
            short = model(x)
            anchors = run.encoder_reduction.anchor_BM
        with case.attach(model, restore=True):
            full = model(x)
    assert full.last_hidden_state.shape == (3, 65, 16)
    rows = torch.arange(3)[:, None]
    assert torch.equal(full.last_hidden_state[rows, anchors], short.last_hidden_state)
    assert torch.equal(full.logits, short.logits)
    gone = torch.ones(3, 65, dtype=torch.bool).scatter(1, anchors, False)
    assert bool((full.last_hidden_state[gone].abs().sum(-1) > 0).all())


def test_alignment_matters_and_only_behind_a_cut():
    case = CASES["tovim"]
    model, x = case.model(), case.input()
    outs = {}
    for recipe in ("tovim", "tovim(align=False)"):
        states: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda m, a, out, states=states: states.append(out[0]))
            for layer in model.layers
        ]
        with foveate.reduce(model, recipe, retain=0.5) as run:
            run_of(model, x)
            first = run.report.stages[0].layer
        for handle in handles:
            handle.remove()
        outs[recipe] = states
    same = [torch.equal(a, b) for a, b in zip(*outs.values(), strict=True)]
    assert all(same[:first]) and not any(same[first : first + 1])


def test_a_model_that_pools_cannot_be_restored():
    case = CASES["s5"]
    with pytest.raises(AttachmentError, match="no full length"):
        case.attach(case.model(), restore=True)


# -- S5 -------------------------------------------------------------------------------------------


def test_s5_needs_its_generator():
    model, x = vis4mer(mask_generator=False).eval(), CASES["s5"].input()
    with (
        foveate.reduce(model, "s5", retain=0.5),
        pytest.raises(AttachmentError, match="trained mask generator"),
    ):
        run_of(model, x)


def test_s5_takes_the_tokens_that_the_generator_would_keep():
    case = CASES["s5"]
    model, x = case.model(), case.input()
    with torch.no_grad():
        logits = model.keep_logits(model.encode(x))
    with case.attach(model) as run:
        run_of(model, x)
        kept = run.encoder_reduction.anchor_BM
    odds = logits[..., 0] - logits[..., 1]
    assert torch.equal(kept, odds.topk(19).indices.sort().values)


def test_s5_in_place_is_the_masked_forward_of_training():
    case = CASES["s5-zero"]
    model, x = case.model(), case.input()
    with case.attach(model) as run:
        found = run_of(model, x)
        mask = (run.encoder_reduction.groups_BN >= 0).float()
    with torch.no_grad():
        assert torch.equal(found, model(x, mask))
    assert mask.sum(1).tolist() == [19, 19, 19]


def test_gathered_tokens_leave_the_first_layer_as_masked_ones_do():
    """The kernel at true distances: what the first layer gives at kept places is the same."""
    seen: dict[str, torch.Tensor] = {}
    case = CASES["s5"]
    model, x = case.model(), case.input()
    for recipe in ("s5", 's5(form="zero")'):
        with foveate.reduce(model, recipe, retain=0.5) as run:
            handle = model.s4_layers[0].register_forward_hook(
                lambda m, a, out, recipe=recipe: seen.update({recipe: out})
            )
            run_of(model, x)
            handle.remove()
            kept = run.encoder_reduction.anchor_BM
    gathered, masked = seen.values()
    at_kept = masked.gather(2, kept[:, None].expand_as(gathered))
    torch.testing.assert_close(gathered, at_kept, rtol=1e-4, atol=1e-5)


def test_recurrent_layers_give_the_same():
    one, other = CASES["s5"], CASES["s5-recurrent"]
    a, b, x = one.model(), other.model(), one.input()
    b.load_state_dict(a.state_dict())
    with one.attach(a), other.attach(b):
        torch.testing.assert_close(run_of(a, x), run_of(b, x), rtol=1e-4, atol=1e-4)
