"""STViT: pooling to semantic tokens, what they read, and what is recovered from them.

Legend: B images, N image tokens, T semantic tokens, M with prefix tokens, C channels.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate import ops
from foveate.core import Recipe
from foveate.core.flops import EncoderDims, encoder_flops
from foveate.methods import _stvit_modules
from foveate.methods.stvit import (
    CrossBlock,
    SemanticGroup,
    STViT,
    blocks_from_tensors,
    semantic_reduction,
)
from foveate.models.registry import adapter_for
from tiny import TINY_ENCODERS, tiny_encoder, tiny_inputs, tiny_model

from .published_figures import DEIT_S, stvit

CLOSE = {"atol": 2e-5, "rtol": 0}


def images(num: int = 2, side: int = 48) -> torch.Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))


def block(width: int = 8, heads: int = 2, seed: int = 0, scale: float | None = None) -> CrossBlock:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = CrossBlock(width, heads, 2 * width, scale=1.0 if scale is None else scale)
        if scale is None:
            for parameter in made.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
    return made.eval()


def group(width: int = 8, recover: float | None = None, **settings) -> SemanticGroup:
    blocks = {n: block(width, seed=i) for i, n in enumerate(("stgm1", "stgm2", "local", "glob"))}
    blocks["recover"] = block(width, seed=4, scale=recover)
    return SemanticGroup(**blocks, **settings).eval()


# -- the group ----------------------------------------------------------------------------------


@torch.no_grad()
def test_shapes_depend_on_the_plane_alone():
    made = group(window=(7, 7), cells=(3, 3))
    for x_BNC in (torch.randn(2, 196, 8), torch.zeros(2, 196, 8), 1e4 * torch.ones(2, 196, 8)):
        steps = made.steps(x_BNC, (14, 14))
        assert steps.semantic_BTC.shape == (2, 36, 8)
        assert steps.recovered_BNC.shape == (2, 196, 8)
    assert made.steps(torch.randn(1, 98, 8), (14, 7)).semantic_BTC.shape == (1, 18, 8)


@torch.no_grad()
def test_recovery_with_scales_of_zero_is_the_identity():
    x_BNC = torch.randn(2, 196, 8)
    assert torch.equal(group(recover=0.0)(x_BNC, (14, 14)), x_BNC)
    assert not torch.equal(group(recover=0.1)(x_BNC, (14, 14)), x_BNC)


@torch.no_grad()
def test_image_tokens_come_back_in_raster_order():
    """Each reads semantic tokens on its own: change one, and only its own output changes."""
    made, x_BNC = group(), torch.randn(1, 196, 8)
    semantic_BTC = torch.randn(1, 36, 8)
    before_BNC = made.recover(x_BNC, semantic_BTC)
    x_BNC[0, 60] += 1
    changed_N = (made.recover(x_BNC, semantic_BTC) - before_BNC)[0].abs().amax(1) > 0
    assert changed_N.nonzero()[:, 0].tolist() == [60]


@torch.no_grad()
def test_permuting_windows_permutes_semantic_tokens(monkeypatch):
    """Where windows read nothing around them."""
    monkeypatch.setattr(_stvit_modules, "MARGIN", 0)
    made, x_BNC = group(), torch.randn(1, 196, 8)
    order = torch.tensor([2, 0, 3, 1])

    def swapped(x_BNC, plane, window):
        return ops.join_windows(ops.cut_windows(x_BNC, plane, window)[order], plane, window)

    first = made.steps(x_BNC, (14, 14))
    second = made.steps(swapped(x_BNC, (14, 14), (7, 7)), (14, 14))
    assert torch.equal(second.pooled_WsC, first.pooled_WsC[order])
    for name in ("refined_BTC", "centres_BTC", "local_BTC", "semantic_BTC"):
        expected = swapped(getattr(first, name), (6, 6), (3, 3))
        torch.testing.assert_close(getattr(second, name), expected, **CLOSE)
    expected = swapped(first.recovered_BNC, (14, 14), (7, 7))
    torch.testing.assert_close(second.recovered_BNC, expected, **CLOSE)


def test_surroundings_are_those_of_the_released_unfold():
    place = torch.arange(196.0).view(1, 1, 14, 14)
    unfolded = torch.nn.functional.unfold(place, kernel_size=10, stride=4)[0].T.long()
    assert torch.equal(ops.surroundings((14, 14), (7, 7), 3), unfolded)
    assert torch.equal(ops.surroundings((14, 14), (14, 14), 3)[0], torch.arange(196))
    inside = ops.surroundings((21, 35), (7, 7), 3)
    assert inside.shape == (15, 100) and int(inside.min()) >= 0 and int(inside.max()) < 21 * 35
    assert all(len(set(row.tolist())) == 100 for row in inside)
    for window, own in zip(
        inside, ops.cut_windows(torch.arange(735.0).view(1, 735, 1), (21, 35), (7, 7)), strict=True
    ):
        assert set(own[:, 0].long().tolist()) <= set(window.tolist())


def test_cells_take_equal_shares_and_hold_their_maxima():
    share_TN = ops.cell_shares((14, 14), (7, 7), (3, 3))
    assert share_TN.shape == (36, 196)
    torch.testing.assert_close(share_TN.sum(1), torch.ones(36))
    assert (share_TN > 0).any(0).all()
    x_1NC = torch.randn(1, 196, 5)
    pooled = ops.pool_windows(x_1NC, (14, 14), (7, 7), (3, 3))
    raster_TC = ops.join_windows(pooled, (6, 6), (3, 3))[0]
    for t in range(36):
        assert torch.equal(raster_TC[t], x_1NC[0, share_TN[t] > 0].amax(0))
    with pytest.raises(ValueError, match="do not fill a plane"):
        ops.windows_of((14, 14), (5, 7))


# -- in an encoder ------------------------------------------------------------------------------


def towers() -> list[str]:
    return [*TINY_ENCODERS, "internvl"]


def encoder_of(family: str):
    """An encoder, how to call it, and its tower."""
    if family != "internvl":
        model = tiny_encoder(family)
        return model, lambda: model(images()), adapter_for(model).tower(model)
    model = tiny_model(family)
    inputs = tiny_inputs(family)
    return model, lambda: model(**inputs), adapter_for(model).towers(model)["image"]


@pytest.mark.parametrize("family", towers())
@torch.no_grad()
def test_semantic_tokens_go_through_the_encoders_own_blocks(family):
    """As if image tokens stayed in the sequence and were thrown away behind each of the two."""
    model, call, tower = encoder_of(family)
    prefix, ends = tower.num_prefix, {}

    def note(index):
        def hook(module, args, kwargs, out):
            whole = (args, kwargs)
            ends[index] = whole, out[0] if isinstance(out, tuple) else out

        return hook

    with foveate.reduce(model, "stvit", retain=9 / 36):
        handles = [
            b.register_forward_hook(note(i), with_kwargs=True) for i, b in enumerate(tower.blocks)
        ]
        call()
        for handle in handles:
            handle.remove()
    (args, kwargs), x_BNC = ends[0]
    args = args[1:]
    N = x_BNC.shape[1] - prefix
    plane = (round(N**0.5),) * 2
    assert N in (36, 64)
    image_BNC = x_BNC[:, prefix:]
    reduction = semantic_reduction(x_BNC, prefix, plane, (3, 3) if N == 36 else (4, 4))
    s_BMC, M = reduction.features_BMD, reduction.num_out
    for index in (1, 2):
        whole_BLC = torch.cat([s_BMC, image_BNC], dim=1)
        out = tower.blocks[index](whole_BLC, *args, **kwargs)
        s_BMC = (out[0] if isinstance(out, tuple) else out)[:, :M]
        if index < tower.feature_block:
            torch.testing.assert_close(ends[index][1], s_BMC, **CLOSE)
    if tower.feature_block == 3 and family != "internvl":
        out = tower.blocks[3](s_BMC, *args, **kwargs)
        s_BMC = out[0] if isinstance(out, tuple) else out
        torch.testing.assert_close(ends[3][1], s_BMC, **CLOSE)


def test_counts_and_cells():
    model = tiny_encoder("vit")
    for retain, cells in ((9 / 36, 9), (0.4, 12), (1 / 36, 1), (0.8, 24)):
        with torch.no_grad(), foveate.reduce(model, "stvit", retain=retain) as run:
            hidden = model(images()).last_hidden_state
        left = hidden.shape[1] - 1
        assert left <= retain * 36 + 0.5 and left >= cells - 4
        assert run.report.stages[0].after == (1 + left,) * 2
        with torch.no_grad(), foveate.reduce(model, "stvit", tokens=left):
            assert model(images()).last_hidden_state.shape[1] == 1 + left


def test_unmerged_patches_have_what_their_cell_has_become():
    model, pixels = tiny_encoder("siglip"), images()
    with torch.no_grad(), foveate.reduce(model, "stvit", retain=9 / 36) as run:
        short_BTC = model(pixels, output_hidden_states=True).hidden_states[-1]
    with torch.no_grad(), foveate.reduce(model, "stvit", retain=9 / 36, restore=True):
        full_BNC = model(pixels, output_hidden_states=True).hidden_states[-1]
    assert full_BNC.shape == (2, 36, 24)
    expected = short_BTC.view(2, 3, 3, 24).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(full_BNC, expected.flatten(1, 2), **CLOSE)
    assert run.encoder_reduction.kind == "synthesise"
    sizes_BT = run.encoder_reduction.sizes(torch.ones(2, 36))
    torch.testing.assert_close(sizes_BT, torch.full((2, 9), 4.0))


def trained(tmp_path, names, centres=None, width=24, scale=None):
    tensors = {}
    for seed, name in enumerate(names):
        for key, value in block(width, 3, seed, scale).state_dict().items():
            tensors[f"{name}.{key}"] = value
    if centres is not None:
        tensors["global_tokens"] = centres
    path = str(tmp_path / "weights.safetensors")
    save_file(tensors, path)
    return path, blocks_from_tensors(tensors, 3)[0]


@torch.no_grad()
def test_trained_blocks_take_the_place_of_the_encoders(tmp_path):
    """The group of STViT-R with the whole image for a window, around the encoder's last block."""
    centres_1TC = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(2))
    path, blocks = trained(tmp_path, ("stgm1", "stgm2", "recover"), centres_1TC)
    model, pixels = tiny_encoder("siglip"), images()
    tower, seen = adapter_for(model).tower(model), {}
    method = STViT(weights=path, num_heads=3)
    recover = blocks.pop("recover")
    made = SemanticGroup(**blocks, global_tokens=centres_1TC, window=(6, 6), cells=(3, 3))
    image_BNC = model(pixels, output_hidden_states=True).hidden_states[1]
    semantic_BTC = made.steps(image_BNC, (6, 6)).centres_BTC
    handle = tower.blocks[3].register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    with foveate.reduce(model, method) as run:
        short_BTC = model(pixels, output_hidden_states=True).hidden_states[-1]
    handle.remove()
    assert run.report.stages[0].after == (9, 9)
    torch.testing.assert_close(seen["args"][0], semantic_BTC, **CLOSE)
    out = tower.blocks[3](semantic_BTC, *seen["args"][1:], **seen["kwargs"])
    expected_BTC = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(short_BTC, expected_BTC, **CLOSE)
    with foveate.reduce(model, method, restore=True):
        full_BNC = model(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(full_BNC, recover(image_BNC, expected_BTC), **CLOSE)


@pytest.mark.parametrize("family", ["vit", "deit"])
@torch.no_grad()
def test_trained_blocks_take_prefix_tokens_with_them(family, tmp_path):
    path, blocks = trained(tmp_path, ("stgm1",))
    model, pixels = tiny_encoder(family), images()
    prefix = adapter_for(model).tower(model).num_prefix
    x_BNC = model(pixels, output_hidden_states=True).hidden_states[1]
    pooled_BMC = semantic_reduction(x_BNC, prefix, (6, 6), (3, 3)).features_BMD
    read_BLC = torch.cat([pooled_BMC, x_BNC[:, prefix:]], dim=1)
    expected_BMC = blocks["stgm1"](pooled_BMC, read_BLC)
    with foveate.reduce(model, STViT(weights=path, num_heads=3), retain=9 / 36):
        states = model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[2], expected_BMC, **CLOSE)


@pytest.mark.parametrize("family", ["vit", "siglip", "dinov2"])
@torch.no_grad()
def test_learned_centres_of_zero_change_nothing(family, tmp_path):
    model, pixels = tiny_encoder(family), images()
    with foveate.reduce(model, "stvit", retain=9 / 36):
        expected = model(pixels).last_hidden_state
    path, _ = trained(tmp_path, (), torch.zeros(1, 9, 24))
    with foveate.reduce(model, STViT(weights=path)):
        torch.testing.assert_close(model(pixels).last_hidden_state, expected, **CLOSE)
    path, _ = trained(tmp_path, (), 10 * torch.randn(1, 9, 24))
    with foveate.reduce(model, STViT(weights=path)):
        assert (model(pixels).last_hidden_state - expected).abs().max() > 0.1


@torch.no_grad()
def test_recovery_of_scale_zero_is_the_image_before_pooling(tmp_path):
    path, _ = trained(tmp_path, ("recover",), scale=0.0)
    model, pixels = tiny_encoder("vit"), images()
    before_BNC = model(pixels, output_hidden_states=True).hidden_states[1]
    with foveate.reduce(model, STViT(weights=path, num_heads=3), retain=0.3, restore=True):
        after_BNC = model(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(after_BNC[:, 1:], before_BNC[:, 1:])
    assert not torch.equal(after_BNC[:, :1], before_BNC[:, :1])


# -- cost ---------------------------------------------------------------------------------------


def test_flops_are_those_of_the_run():
    """Under torch's counter, on the meta device, where it sees fused attention."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=12, num_attention_heads=3, intermediate_size=96
    )
    with torch.device("meta"):
        model = ViTModel(config, add_pooling_layer=False).eval()
        pixels = torch.zeros(1, 3, 224, 224)
    with foveate.reduce(model, "stvit") as run, FlopCounterMode(display=False) as counter:
        model(pixels)
    assert run.report.stages[0].after == (17,)
    dims = EncoderDims(12, 24, 3, 8, 96, 768)
    assert run.report.flops["reduced"]["encoder"] == stvit(dims)
    sizes = 2 * 17 * 197  # how many patches each token stands for
    expected = run.report.flops["reduced"]["encoder"] - dims.patch_embedding + sizes
    assert counter.get_total_flops() == expected  # the rule takes [CLS] for a patch


def test_savings():
    full = encoder_flops(DEIT_S, 197)
    assert 0.57 <= 1 - stvit(DEIT_S) / full <= 0.60
    # Eight blocks of width 128, three of them on image tokens: at least 45 % less.
    small = EncoderDims(8, 128, 4, 32, 512, 192)
    assert 1 - stvit(small, after=3) / encoder_flops(small, 197) >= 0.45


# -- bad input ----------------------------------------------------------------------------------


def test_bad_arguments(tmp_path):
    for arguments, message in (
        ({"after": 0}, "after must be above 0"),
        ({"num_heads": -1}, "num_heads must"),
        ({"eps": 0}, "eps above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            STViT(**arguments)
    model = tiny_encoder("vit")
    for method, message in (
        (STViT(after=3), "two blocks must follow"),
        (STViT(weights=str(tmp_path / "none")), "there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            foveate.reduce(model, method)
    with pytest.raises(ValueError, match="must divide the width"):
        CrossBlock(8, 3, 16)
    with pytest.raises(ValueError, match=r"knows global_tokens and the blocks .* found odd"):
        blocks_from_tensors({"odd.weight": torch.zeros(1)}, 2)
    with pytest.raises(ValueError, match="needs a tensor"):
        blocks_from_tensors({"stgm1.norm1.weight": torch.zeros(1)}, 2)
    tensors = {f"glob.{k}": v for k, v in block().state_dict().items() if "norm2" not in k}
    with pytest.raises(ValueError, match="not the tensors of a block"):
        blocks_from_tensors(tensors, 2)
    with pytest.raises(ValueError, match="learned centres for 36"):
        group(global_tokens=torch.zeros(1, 9, 8)).steps(torch.zeros(1, 196, 8), (14, 14))


@torch.no_grad()
def test_bad_weights_and_companions(tmp_path):
    model, pixels = tiny_encoder("vit"), images()

    def fails(method, message, **options):
        with (
            foveate.reduce(model, method, **options),
            pytest.raises(ValueError, match=message),
        ):
            model(pixels)

    path, _ = trained(tmp_path, (), torch.zeros(1, 9, 24))
    fails(STViT(weights=path), "9 learned centres; 12 semantic tokens", tokens=12)
    path, _ = trained(tmp_path, (), torch.zeros(1, 9, 20))
    fails(STViT(weights=path), r"width \[20\]; this one's is 24")
    (tmp_path / "broken").write_text("nothing")
    fails(STViT(weights=str(tmp_path / "broken")), "is no safetensors file")
    fails(Recipe.of("tome + stvit(retain=0.2)"), "no other method can shorten", retain=0.1)


def test_every_image_of_a_call_is_pooled_alike():
    model, pixels = tiny_encoder("vit"), images(3)
    with torch.no_grad(), foveate.reduce(model, "stvit", retain=0.3):
        together = model(pixels).last_hidden_state
        for image in range(3):
            alone = model(pixels[image : image + 1]).last_hidden_state
            torch.testing.assert_close(together[image : image + 1], alone, **CLOSE)
