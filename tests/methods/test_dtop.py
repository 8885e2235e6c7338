"""Dynamic Token Pruning: what leaves, what stays, what is predicted, and what it costs.

Legend: B images, K classes, n tokens, P patches, C channels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import foveate
from foveate import ops
from foveate.core import Recipe, get_method
from foveate.methods.dtop import (
    DToP,
    MaskHead,
    heads_from_tensors,
    heads_to_tensors,
    segmentation_loss,
    update_canvas,
)
from foveate.models.registry import adapter_for
from tiny import TINY_ENCODERS, tiny_encoder

CLOSE = {"atol": 2e-5, "rtol": 0}


class Sure(MaskHead):
    """A head that is sure of many patches: more of bright ones than of others."""

    def __init__(self, seed: int) -> None:
        super().__init__(24, 3, width=8, num_heads=2)
        generator = torch.Generator().manual_seed(seed)
        self.weight_KC = 3 * torch.randn(3, 24, generator=generator)
        self.eval()

    def forward(self, x_BnC, mask_Bn=None):
        present_BK2 = torch.tensor([9.0, -9.0]).expand(x_BnC.shape[0], 3, 2)
        return self.weight_KC @ x_BnC.transpose(1, 2), present_BK2


def sure_heads() -> tuple[MaskHead, ...]:
    return tuple(Sure(seed) for seed in range(3))


def heads(num: int = 3, width: int = 24) -> tuple[MaskHead, ...]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tuple(MaskHead(width, 3, width=8, num_heads=2).eval() for _ in range(num))


def images(num: int = 3) -> torch.Tensor:
    return torch.randn(num, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run_on(model, pixels, method, **options):
    with foveate.reduce(model, method, **options) as run:
        hidden = model(pixels).last_hidden_state
    return hidden, run


# -- the rule -----------------------------------------------------------------------------------


def released_rule(score_Kn: torch.Tensor, tau: float, keep: int) -> list[bool]:
    """The decision for one image, token by token."""
    value_n, class_n = score_Kn.max(0)
    sure = [i for i, v in enumerate(value_n.tolist()) if v > tau]
    gone = [False] * score_Kn.shape[1]
    for kind in {int(class_n[i]) for i in sure}:
        own = sorted((i for i in sure if class_n[i] == kind), key=lambda i: -float(value_n[i]))
        for i in own[keep:]:
            gone[i] = True
    return gone


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_sure_tokens_are_those_of_a_loop(keep):
    generator = torch.Generator().manual_seed(keep)
    score_BKn = torch.rand(4, 3, 40, generator=generator)
    # Ties, of which the first stay.
    score_BKn = (score_BKn * 20).round() / 20
    mask_Bn = torch.rand(4, 40, generator=generator) > 0.2
    found_Bn = ops.sure_tokens(score_BKn, 0.82, keep, mask_Bn)
    for b in range(4):
        alone = released_rule(score_BKn[b][:, mask_Bn[b]], 0.82, keep)
        assert found_Bn[b, mask_Bn[b]].tolist() == alone
    assert not found_Bn[~mask_Bn].any()
    # What stays of every class that has sure tokens: as many of them as may.
    value_Bn, class_Bn = score_BKn.max(1)
    sure_Bn = (value_Bn > 0.82) & mask_Bn
    for b in range(4):
        for kind in range(3):
            own_n = sure_Bn[b] & (class_Bn[b] == kind)
            stay = int((own_n & ~found_Bn[b]).sum())
            assert stay == min(keep, int(own_n.sum()))


def test_nothing_is_surer_than_one():
    score_BKn = torch.ones(1, 2, 9)
    assert not ops.sure_tokens(score_BKn, 1.0, 0).any()
    assert ops.sure_tokens(score_BKn, 0.99, 0).all()


def test_a_budget_keeps_anchors_and_what_is_least_sure():
    score_BKn = torch.tensor([[[0.9, 0.8, 0.7, 0.1, 0.2, 0.3]], [[0.5, 0.5, 0.5, 0.5, 0.5, 0.6]]])
    keep_Bn = ops.least_sure_tokens(score_BKn, torch.tensor([3, 2]), keep_per_class=1)
    assert keep_Bn[0].nonzero()[:, 0].tolist() == [0, 3, 4]
    # Of equally sure ones the first stay.
    assert keep_Bn[1].nonzero()[:, 0].tolist() == [0, 5]


def test_a_canvas_keeps_what_has_left():
    generator = torch.Generator().manual_seed(0)
    canvas_BKP, group_BP = torch.zeros(2, 3, 7), torch.arange(7).expand(2, 7)
    first_BKP = torch.randn(2, 3, 7, generator=generator)
    canvas_BKP = update_canvas(canvas_BKP, first_BKP, group_BP)
    assert torch.equal(canvas_BKP, first_BKP)
    left_BP = torch.tensor([[0, -1, 1, -1, 2, -1, 3]]).expand(2, 7)
    second_BKn = torch.randn(2, 3, 4, generator=generator)
    canvas_BKP = update_canvas(canvas_BKP, second_BKn, left_BP)
    assert torch.equal(canvas_BKP[:, :, ::2], second_BKn)
    assert torch.equal(canvas_BKP[:, :, 1::2], first_BKP[:, :, 1::2])


# -- in an encoder ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_a_threshold_of_one_is_the_dense_model(family):
    model, pixels, own = tiny_encoder(family), images(), sure_heads()
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True)
    hidden, run = run_on(model, pixels, DToP(heads=own, tau=1.0))
    assert torch.equal(hidden, expected.last_hidden_state)
    assert not run.report.stages and (run.dense.stage_BP == 2).all()
    prefix = adapter_for(model).tower(model).num_prefix
    logits_BKP, class_BK2 = own[-1](expected.hidden_states[-1][:, prefix:])
    torch.testing.assert_close(run.dense.mask_logits_BKP, logits_BKP, **CLOSE)
    assert torch.equal(run.dense.class_logits_BK2, class_BK2)


@torch.no_grad()
def by_hand(model, pixels_13HW, method: DToP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image alone, token by token: canvas, stages, and what leaves the last block."""
    tower = adapter_for(model).tower(model)
    seen = []
    handle = tower.blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    model(pixels_13HW)
    handle.remove()
    (args, kwargs), prefix = seen[0], tower.num_prefix
    x_1nC = args[0]
    place = list(range(x_1nC.shape[1] - prefix))
    canvas_KP, stage_P = torch.zeros(3, len(place)), torch.zeros(len(place), dtype=torch.long)
    stages = method.blocks(len(tower.blocks))
    for index, block in enumerate(tower.blocks):
        x_1nC = block(x_1nC, *args[1:], **kwargs)
        x_1nC = x_1nC[0] if isinstance(x_1nC, tuple) else x_1nC
        if index not in stages:
            continue
        stage = stages.index(index)
        logits_1Kn, class_1K2 = method.heads[stage](x_1nC[:, prefix:])
        canvas_KP[:, place] = logits_1Kn[0]
        stage_P[place] = stage
        if stage < len(stages) - 1:
            score_Kn = class_1K2.softmax(-1)[0, :, :1] * logits_1Kn[0].sigmoid()
            gone = released_rule(score_Kn, method.tau, method.keep_per_class)
            stay = [i for i, leaves in enumerate(gone) if not leaves]
            place = [place[i] for i in stay]
            x_1nC = x_1nC[:, [*range(prefix), *(prefix + i for i in stay)]]
    return canvas_KP, stage_P, x_1nC[0]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_ragged_images_equal_loops_by_hand(family, attn):
    model, pixels = tiny_encoder(family, attn=attn), images(5)
    method = DToP(heads=sure_heads(), tau=0.9, keep_per_class=2)
    tower, rows, last = adapter_for(model).tower(model), [], []
    with torch.no_grad(), foveate.reduce(model, method, restore=False) as run:
        handles = [
            block.register_forward_pre_hook(
                lambda m, a, k: rows.append((a[0] if a else k["hidden_states"]).shape[:2]),
                with_kwargs=True,
            )
            for block in tower.blocks
        ]
        handles.append(tower.blocks[-1].register_forward_hook(lambda m, a, out: last.append(out)))
        model(pixels)
        for handle in handles:
            handle.remove()
    short = last[0][0] if isinstance(last[0], tuple) else last[0]
    counts = []
    for image in range(5):
        canvas_KP, stage_P, x_nC = by_hand(model, pixels[image : image + 1], method)
        torch.testing.assert_close(run.dense.mask_logits_BKP[image], canvas_KP, atol=2e-4, rtol=0)
        assert run.dense.stage_BP[image].tolist() == stage_P.tolist()
        torch.testing.assert_close(short[image, : len(x_nC)], x_nC, **CLOSE)
        counts.append(len(x_nC))
    assert run.report.stages[0].after == tuple(counts)
    assert len(set(counts)) > 1 and min(counts) < max(counts)
    # Nothing is only masked: short images share rows, and the report counts these.
    dense = 5 * rows[0][1]
    assert rows[0] == (5, rows[0][1]) and rows[-1][0] * rows[-1][1] < dense
    if rows[-1][0] == 5:
        assert rows[-1][1] == max(counts)


def test_short_images_share_rows():
    """Two images that are sure of everything go together into one row beside a whole one."""

    class OfLight(Sure):
        def forward(self, x_BnC, mask_Bn=None):
            logits_BKn, present_BK2 = super().forward(x_BnC, mask_Bn)
            sure_B11 = (torch.arange(len(x_BnC)) != 1)[:, None, None]
            return torch.where(sure_B11, logits_BKn.abs() + 9, -9.0), present_BK2

    model, pixels = tiny_encoder("siglip"), images(4)
    tower, rows = adapter_for(model).tower(model), []
    method = DToP(heads=tuple(OfLight(seed) for seed in range(3)), keep_per_class=3)
    with torch.no_grad(), foveate.reduce(model, method) as run:
        handle = tower.mlp_inputs[2].register_forward_pre_hook(
            lambda m, args: rows.append(tuple(args[0].shape[:2]))
        )
        model(pixels)
        handle.remove()
    after = run.report.stages[0].after
    assert after[1] == 36 and max(after[0], after[2], after[3]) <= 9
    assert rows == [(2, 36)]
    flops = run.report.flops
    assert flops["reduced"]["encoder"] < 0.8 * flops["untouched"]["encoder"]


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_a_final_patch_keeps_what_was_said_of_it(family):
    model, own, said = tiny_encoder(family), sure_heads(), []
    for head in own:
        head.register_forward_hook(lambda m, args, out: said.append(out[0]))
    _, run = run_on(model, images(), DToP(heads=own, tau=0.9, keep_per_class=1))
    first_BP = run.dense.stage_BP == 0
    assert first_BP.any() and not first_BP.all()
    kept_BKP = run.dense.mask_logits_BKP
    assert torch.equal(kept_BKP.transpose(1, 2)[first_BP], said[0].transpose(1, 2)[first_BP])


@pytest.mark.parametrize("retain", [0.25, 0.5, 0.8])
def test_a_budget_is_met_exactly_and_evenly(retain):
    model = tiny_encoder("vit")
    hidden, run = run_on(model, images(), DToP(heads=heads()), retain=retain)
    assert hidden.shape[1] == 1 + round(36 * retain)
    assert run.report.stages[0].after == (hidden.shape[1],) * 3
    counts = torch.stack([stage_P.bincount(minlength=3) for stage_P in run.dense.stage_BP])
    # The same share from stage to stage.
    assert (counts.cumsum(1)[:, 0] == 36 - round(36 * retain**0.5)).all()
    _, run = run_on(model, images(), DToP(heads=heads()), tokens=7)
    assert run.report.stages[0].after == (8, 8, 8)


def test_cost_varies_with_the_image_and_with_the_threshold():
    model, own = tiny_encoder("siglip"), sure_heads()
    costs = []
    for tau in (0.5, 0.9, 0.999, 1.0):
        _, run = run_on(model, images(1), DToP(heads=own, tau=tau, keep_per_class=1))
        costs.append(run.report.flops["reduced"]["encoder"])
    assert costs == sorted(costs) and costs[0] < costs[2] <= costs[3]
    assert costs[3] == run.report.flops["untouched"]["encoder"]
    each = set()
    for image in images(5):
        _, run = run_on(model, image[None], DToP(heads=own, keep_per_class=1))
        each.add(run.report.flops["reduced"]["encoder"])
    assert len(each) > 1
    assert any("heads of dtop" in note for note in run.report.notes)


def test_restored_patches_are_in_the_state_in_which_they_left():
    model, pixels, own = tiny_encoder("siglip"), images(), sure_heads()
    method, states = DToP(heads=own, keep_per_class=1), []
    own[0].register_forward_hook(lambda m, args, out: states.append(args[0]))
    with torch.no_grad(), foveate.reduce(model, method, restore=True) as run:
        out = model(pixels, output_hidden_states=True)
    first_BP = run.dense.stage_BP == 0
    assert first_BP.any()
    assert torch.equal(out.hidden_states[-1][first_BP], states[0][first_BP])


def test_merged_patches_are_predicted_together():
    model, own = tiny_encoder("siglip"), sure_heads()
    recipe = Recipe.of(["tome(retain=0.8)", DToP(heads=own, keep_per_class=1)])
    _, run = run_on(model, images(), recipe, retain=0.4)
    dense = run.dense
    assert dense.mask_logits_BKP.shape == (3, 3, 36) and dense.mask_logits_BKP.isfinite().all()
    reduction = run.encoder_reduction
    last_BP = reduction.groups_BN
    for b in range(3):
        for target in last_BP[b].unique().tolist():
            same_P = last_BP[b] == target
            if target >= 0 and same_P.sum() > 1:
                assert (dense.mask_logits_BKP[b][:, same_P].std(1) == 0).all()


def test_beside_the_gate_of_the_patches_stage():
    model, pixels = tiny_encoder("siglip"), images()
    pixels[1:, :, :24] = pixels[:1, :, :24]
    recipe = Recipe.of(["grt(tau=1.0)", DToP(heads=sure_heads(), keep_per_class=1)])
    _, run = run_on(model, pixels, recipe, restore=True)
    never_BP = run.dense.stage_BP < 0
    assert never_BP[1:, :18].all() and not never_BP[0].any()
    assert (run.dense.mask_logits_BKP.transpose(1, 2)[never_BP] == -torch.inf).all()
    assert (run.dense.scores().flatten(2).transpose(1, 2)[never_BP] == 0).all()


def test_segmentations_have_the_size_that_is_asked_for():
    _, run = run_on(tiny_encoder("vit"), images(), DToP(heads=heads()), retain=0.5)
    assert run.dense.scores().shape == (3, 3, 6, 6)
    assert run.dense.classes((48, 48)).shape == (3, 48, 48)
    assert run.dense.scores((12, 12)).amax() <= 1
    small_BKhw = run.dense.scores()
    assert torch.equal(small_BKhw.argmax(1), run.dense.classes())
    with pytest.raises(ValueError, match="does not hold the 36 patches"):
        replace(run.dense, plane=(5, 6))


# -- the head -----------------------------------------------------------------------------------


def test_padding_changes_nothing_for_others():
    (head,) = heads(1)
    x_BnC = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    mask_Bn = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    masks_BKn, classes_BK2 = head(x_BnC, mask_Bn)
    alone_1Kn, alone_1K2 = head(x_BnC[1:, :6])
    torch.testing.assert_close(masks_BKn[1:, :, :6], alone_1Kn, **CLOSE)
    torch.testing.assert_close(classes_BK2[1:], alone_1K2, **CLOSE)


def test_the_head_is_a_query_per_class_with_attention_for_a_mask():
    """Against torch's own decoder layer, whose weights are those of this one."""
    (head,) = heads(1)
    x_BnC = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    y_BnD = head.proj_norm(head.input_proj(x_BnC))
    query_BKD = head.q.weight.expand(2, -1, -1)
    for layer in head.decoder.layers:
        own, cross = torch.nn.TransformerDecoderLayer(8, 2, 32, batch_first=True).eval(), None
        cross = layer.multihead_attn
        weights = {k: v for k, v in layer.state_dict().items() if "multihead" not in k}
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(cross, name), kind) for name in "qkv"]
            weights[f"multihead_attn.in_proj_{kind}"] = torch.cat(parts)
            weights[f"multihead_attn.out_proj.{kind}"] = getattr(cross.proj, kind)
        own.load_state_dict(weights)
        query_BKD, before_BKD = own(query_BKD, y_BnD), query_BKD
    masks_BKn, classes_BK2 = head(x_BnC)
    torch.testing.assert_close(classes_BK2, head.class_embed(query_BKD), **CLOSE)
    layer = head.decoder.layers[-1]
    own_BKD = layer.self_attn(before_BKD, before_BKD, before_BKD)[0]
    q_BKD = layer.multihead_attn.q(layer.norm1(before_BKD + own_BKD))
    k_BnD = layer.multihead_attn.k(y_BnD)
    expected = sum(q_BKD[..., h : h + 4] @ k_BnD[..., h : h + 4].transpose(1, 2) for h in (0, 4))
    torch.testing.assert_close(masks_BKn, expected / 2 / 2, **CLOSE)


def test_weights_come_from_a_file(tmp_path):
    own, pixels, model = heads(), images(), tiny_encoder("vit")
    expected, first = run_on(model, pixels, DToP(heads=own), retain=0.5)
    plain = heads_to_tensors(own)
    released = {
        name.replace("heads.0.", "auxiliary_head.0.")
        .replace("heads.1.", "auxiliary_head.1.")
        .replace("heads.2.", "decode_head."): value
        for name, value in plain.items()
    }
    released["backbone.layers.0.weight"] = torch.zeros(1)
    for name, tensors in (("plain", plain), ("released", released)):
        path = str(tmp_path / f"{name}.safetensors")
        save_file(tensors, path)
        method = DToP(weights=path, num_heads=2)
        got, run = run_on(model, pixels, method, retain=0.5)
        assert torch.equal(got, expected)
        assert torch.equal(run.dense.mask_logits_BKP, first.dense.mask_logits_BKP)
        assert Recipe.of(method) == Recipe.from_json(Recipe.of(method).to_json())
    # Modules are not written down, and what is read back says so when it is used.
    again = Recipe.from_json(Recipe.of(DToP(heads=own, tau=0.8)).to_json())
    assert again.steps[0].method == DToP(tau=0.8)
    with pytest.raises(ValueError, match="has none: pass weights="):
        foveate.reduce(model, again)


def test_bfloat16_encoders_work_with_heads_of_full_precision():
    model = tiny_encoder("vit").to(torch.bfloat16)
    hidden, run = run_on(model, images().bfloat16(), DToP(heads=heads()), retain=0.5)
    assert hidden.dtype == torch.bfloat16 and run.dense.mask_logits_BKP.dtype == torch.float32


def test_flops_of_a_head_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    head = MaskHead(24, 7, width=16, num_heads=2).eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        head.to("meta")(torch.zeros(1, 30, 24))
    assert head.flops(30) == counter.get_total_flops()


# -- the loss -----------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    classes = torch.randn(2, 3, 2, generator=generator, requires_grad=True)
    label = torch.randint(0, 2, (2, 4, 4), generator=generator)
    label[0, 0], label[1] = 255, 2
    focal = dice = 0.0
    target = torch.ones(2, 3, dtype=torch.long)
    num = 0
    for b in range(2):
        for kind in range(3):
            is_hw = (label[b] == kind).float()
            if not is_hw.any():
                continue
            num, target[b, kind] = num + 1, 0
            p = masks[b, kind].sigmoid()
            right = p * is_hw + (1 - p) * (1 - is_hw)
            alpha = 0.25 * is_hw + 0.75 * (1 - is_hw)
            focal = focal + (alpha * (1 - right) ** 2 * -right.log()).mean()
            dice = dice + 1 - (2 * (p * is_hw).sum() + 1) / (p.sum() + is_hw.sum() + 1)
    presence = cross_entropy(classes.flatten(0, 1), target.flatten(), torch.tensor([1.0, 0.1]))
    loss = segmentation_loss(masks, classes, label)
    torch.testing.assert_close(loss, presence + (20 * focal + dice) / num)
    loss.backward()
    assert masks.grad.abs().sum() > 0 and classes.grad.abs().sum() > 0


def test_labels_of_nothing_cost_only_presence():
    label = torch.full((1, 4, 4), 255)
    masks, classes = torch.randn(1, 3, 2, 2), torch.zeros(1, 3, 2)
    assert segmentation_loss(masks, classes, label).item() == pytest.approx(0.6931, abs=1e-4)
    for wrong in (torch.full((1, 4, 4), 3), torch.zeros(2, 4, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"Labels are 0\.\.2|Masks \[B, K, h, w\]"):
            segmentation_loss(masks, classes, wrong)


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0}, "tau must lie"),
        ({"tau": 1.5}, "tau must lie"),
        ({"after": ()}, "ascending"),
        ({"after": (0.5, 0.4)}, "ascending"),
        ({"keep_per_class": -1}, "keep_per_class must"),
        ({"num_heads": 0}, "num_heads must"),
        ({"weights": "a", "heads": (1,)}, "not both"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DToP(**arguments)


def test_bad_heads(tmp_path):
    model = tiny_encoder("vit")
    cases = [
        (DToP(), "has none: pass weights="),
        (DToP(heads=heads(2)), "there are 2 heads"),
        (DToP(weights=str(tmp_path / "none.safetensors")), "there is no file"),
        (DToP(heads=heads(3), after=(1, 4)), "without a block of its own"),
        (DToP(heads=(*heads(2), MaskHead(24, 4, 8, 2))), "predict the same classes"),
    ]
    for method, message in cases:
        with pytest.raises(ValueError, match=message):
            foveate.reduce(model, method)
    with pytest.raises(ValueError, match="for an encoder of width 20, not 24"):
        run_on(model, images(), DToP(heads=heads(3, width=20)))
    path = tmp_path / "broken.safetensors"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        run_on(model, images(), DToP(weights=str(path)))
    with pytest.raises(ValueError, match="divide the width"):
        MaskHead(24, 3, width=8, num_heads=3)
    tensors = heads_to_tensors(heads(2))
    with pytest.raises(ValueError, match="Heads are named"):
        heads_from_tensors({k: v for k, v in tensors.items() if k.startswith("heads.1.")}, 2)
    with pytest.raises(ValueError, match="not the tensors of a head"):
        heads_from_tensors({k: v for k, v in tensors.items() if "class_embed" not in k}, 2)
    with pytest.raises(ValueError, match="needs a tensor"):
        MaskHead.from_tensors({})
    assert torch.isfinite(run_on(model, images(), "tome", retain=0.5)[0]).all()


def test_the_card_says_where_heads_come_from():
    assert get_method("dtop").card.kind == "trained"
    assert any("none ship" in note for note in get_method("dtop").card.notes)
