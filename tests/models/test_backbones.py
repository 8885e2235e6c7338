"""Backbones that no library ships: layouts of the official code, shapes, costs, training forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from foveate import ops
from foveate.core.backbone_flops import ScanDims, scan_flops
from foveate.errors import UnsupportedModelError
from foveate.models.backbone_adapters import Passage
from foveate.models.backbones import (
    MixSTE,
    MixSTEConfig,
    ViS4mer,
    ViS4merConfig,
    VisionMamba,
    VisionMambaConfig,
    momentum_update,
)
from foveate.models.backbones.vision_ssm import places_around_cls
from foveate.models.registry import adapter_for

MIXSTE = MixSTEConfig(frames=9, joints=4, hidden=16, pairs=3, heads=2)
VIM = VisionMambaConfig(image_size=32, patch_size=8, depth=3, hidden=16, classes=5)
VIS4MER = ViS4merConfig(inputs=8, hidden=16, blocks=2, state=6, classes=5, mask_generator=True)


def spread(model: nn.Module) -> nn.Module:
    """Every parameter away from the zeros and ones that hide mistakes."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_" not in name and "dt_proj" not in name and "log_dt" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.eval()


# -- layouts --------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_official_models():
    def millions(model: nn.Module) -> float:
        return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)

    with torch.device("meta"):
        assert millions(MixSTE(MixSTEConfig(slots=81))) == 35.0
        assert millions(VisionMamba(VisionMambaConfig())) == 7.15
        assert millions(VisionMamba(VisionMambaConfig(hidden=384))) == 25.80


def test_names_are_those_of_the_official_code():
    hot = MixSTE(MixSTEConfig(frames=9, joints=4, hidden=16, pairs=1, heads=2, slots=3))
    assert set(hot.state_dict()) >= {
        "Spatial_patch_to_embedding.weight",
        "Temporal_pos_embed",
        "STEblocks.0.attn.qkv.bias",
        "TTEblocks.0.mlp.fc2.weight",
        "Spatial_norm.weight",
        "pos_embed_token",
        "x_token",
        "cross_attention.linear_q.bias",
        "cross_attention.proj.weight",
        "head.0.weight",
        "head.1.bias",
    }
    mixer = {
        name.removeprefix("layers.0.mixer.")
        for name in VisionMamba(VIM).state_dict()
        if name.startswith("layers.0.mixer.")
    }
    one_way = {"A{}_log", "D{}", "conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight"}
    one_way |= {"dt_proj{}.weight", "dt_proj{}.bias"}
    expected = {name.format(way) for name in one_way for way in ("", "_b")}
    assert mixer == expected | {"in_proj.weight", "out_proj.weight"}
    rest = {name for name in VisionMamba(VIM).state_dict() if not name.startswith("layers")}
    assert rest == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "norm_f.weight", "head.weight", "head.bias",
    }  # fmt: skip
    layer = {
        name.removeprefix("s4_layers.0.")
        for name in ViS4mer(VIS4MER).state_dict()
        if name.startswith("s4_layers.0.")
    }
    assert layer == {
        "D", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag",
        "output_linear.0.weight", "output_linear.0.bias",
    }  # fmt: skip


def test_vim_is_its_formulas_one_step_at_a_time():
    """A forward pass written with loops, from the description of the official block."""
    model = spread(VisionMamba(VIM))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = model.patch_embed(images)
        x = torch.cat([x[:, :8], model.cls_token.expand(2, -1, -1), x[:, 8:]], 1) + model.pos_embed
        residual = torch.zeros_like(x)
        for layer in model.layers:
            residual = residual + x
            x = by_hand(layer.mixer, layer.norm(residual))
        expected = model.norm_f(residual + x)[:, 8]
        expected = model.head(expected)
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-5)


def by_hand(mixer: nn.Module, x_BNC: torch.Tensor) -> torch.Tensor:
    outs = []
    for way in ("", "_b"):
        x = mixer.in_proj(x_BNC if not way else x_BNC.flip(1))
        u, z = x.chunk(2, -1)
        conv, B, N = getattr(mixer, f"conv1d{way}"), x.shape[0], x.shape[1]
        padded = torch.cat([u.new_zeros(B, 3, u.shape[2]), u], 1)
        u = sum(padded[:, k : k + N] * conv.weight[:, 0, k] for k in range(4)) + conv.bias
        u = u * u.sigmoid()
        step, B_in, C_out = getattr(mixer, f"x_proj{way}")(u).split([1, 16, 16], -1)
        step = nn.functional.softplus(getattr(mixer, f"dt_proj{way}")(step))
        A = -getattr(mixer, f"A{way}_log").exp()
        h, ys = torch.zeros(B, *A.shape), []
        for t in range(N):
            h = (step[:, t, :, None] * A).exp() * h
            h = h + step[:, t, :, None] * B_in[:, t, None] * u[:, t, :, None]
            ys.append((h * C_out[:, t, None]).sum(-1) + getattr(mixer, f"D{way}") * u[:, t])
        y = torch.stack(ys, 1) * z * z.sigmoid()
        outs.append(y if not way else y.flip(1))
    return mixer.out_proj((outs[0] + outs[1]) / 2)


def test_s4d_as_convolution_and_as_recurrence():
    model = spread(ViS4mer(VIS4MER))
    other = ViS4mer(ViS4merConfig(**{**vars(VIS4MER), "recurrent": True})).eval()
    other.load_state_dict(model.state_dict())
    tokens = torch.randn(2, 257, 8)
    torch.testing.assert_close(model(tokens), other(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (MixSTE(MIXSTE), (1, 8, 4, 2), "MixSTE takes sequences"),
        (VisionMamba(VIM), (1, 3, 16, 16), "takes images"),
        (ViS4mer(VIS4MER), (1, 16, 4), "takes tokens"),
        (ViS4mer(VIS4MER), (1, 3, 8), "at least 4 tokens"),
    ],
)
def test_input_of_another_shape_is_refused(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixSTEConfig(hidden=10, heads=4), "do not divide"),
        (lambda: MixSTEConfig(frames=9, slots=10), "slots must be"),
        (lambda: VisionMambaConfig(paths=3), "paths must be"),
        (lambda: VisionMambaConfig(paths=4), "has no \\[CLS\\]"),
        (lambda: ViS4merConfig(state=5), "state must be even"),
        (lambda: ViS4merConfig(hidden=12, blocks=3), "cannot be halved"),
        (lambda: ViS4merConfig(dropout=1.0), "dropout must lie"),
    ],
)
def test_impossible_dimensions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_half_precision_keeps_its_dtype():
    assert MixSTE(MIXSTE).bfloat16()(torch.zeros(1, 9, 4, 2).bfloat16()).dtype == torch.bfloat16
    vim = VisionMamba(VIM).bfloat16()
    assert vim(torch.zeros(1, 3, 32, 32).bfloat16()).logits.dtype == torch.bfloat16
    assert ViS4mer(VIS4MER).bfloat16()(torch.zeros(1, 16, 8).bfloat16()).dtype == torch.bfloat16


def test_they_are_no_vision_towers():
    with pytest.raises(UnsupportedModelError, match="no vision transformer"):
        adapter_for(VisionMamba(VIM)).tower(VisionMamba(VIM))


# -- places ---------------------------------------------------------------------------------------


def test_cls_moves_no_further_than_it_has_to():
    source = torch.tensor(
        [[0, 1, 8, 9, 10], [12, 14, 8, 15, 16], [2, 7, 8, 9, 16], [0, 2, 8, 3, 5]]
    )
    place = places_around_cls(source, 8)
    assert place.tolist() == [[0, 1, 8, 9, 10], [11, 13, 14, 15, 16], [2, 7, 8, 9, 16],
                              [0, 2, 3, 4, 6]]  # fmt: skip
    assert bool((place.diff(dim=1) > 0).all())
    everything = torch.arange(17)[None]
    assert torch.equal(places_around_cls(everything, 8), everything)


# -- FLOPs ----------------------------------------------------------------------------------------


def counted(model: nn.Module, x: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        model(x)
    return counter.get_total_flops()


def rule(model: nn.Module, entered: int, lengths: list[int]) -> int:
    return adapter_for(model).flops(model, Passage(entered, lengths, entered))


def test_formulas_are_what_torch_counts():
    mixste = MixSTE(MIXSTE).eval()
    assert counted(mixste, torch.zeros(1, 9, 4, 2)) == rule(mixste, 9, [9] * 3)
    vim = VisionMamba(VIM).eval()
    # Of a scan, torch counts the read-out alone, which is a matrix product here.
    unseen = 3 * 17 * 2 * 4 * 32 * 16
    assert counted(vim, torch.zeros(1, 3, 32, 32)) == rule(vim, 17, [17] * 3) - unseen
    plain = ViS4mer(ViS4merConfig(inputs=8, hidden=16, blocks=2, state=6, classes=5)).eval()
    linear = 2 * 8 * 16 * 20 + 4 * 16 * 16 * 20 + 2 * 16 * 8 * 10
    linear += 4 * 8 * 8 * 10 + 2 * 8 * 4 * 5 + 2 * 4 * 5
    # Kernels are the same for all videos and no part of the rule: 3 states, 5 x 4 and 4 x 3 steps.
    kernels = 2 * 3 * (16 * 5 * 4 + 8 * 4 * 3)
    assert counted(plain, torch.zeros(1, 20, 8)) == linear + kernels
    assert linear < rule(plain, 20, [20, 10])


def test_published_cost_of_vim():
    tiny = ScanDims(24, 192, 384, 16, 12, classes=1000)
    small = ScanDims(24, 384, 768, 16, 24, classes=1000)
    assert abs(scan_flops(tiny, 196, [197] * 24) / 2e9 - 1.5) < 0.05  # 1.5 G in the paper
    assert abs(scan_flops(small, 196, [197] * 24) / 2e9 - 5.1) < 0.3


# -- training forms -------------------------------------------------------------------------------


def test_momentum_is_the_closed_form_and_takes_no_gradient():
    model = ViS4mer(VIS4MER).train()
    generator = model.mask_generator
    assert generator is not None
    start = generator.s4_mom.kernel.C.clone()
    assert torch.equal(start, model.s4_layers[0].kernel.C)
    decay, expected, seen = 0.9, start.clone(), []
    for step in range(5):
        with torch.no_grad():
            model.s4_layers[0].kernel.C.add_(0.1 * (step + 1))
        seen.append(model.s4_layers[0].kernel.C.clone())
        model.update_momentum(decay)
    expected = decay**5 * start
    expected = expected + sum(
        (1 - decay) * decay ** (4 - i) * value for i, value in enumerate(seen)
    )
    torch.testing.assert_close(generator.s4_mom.kernel.C, expected.detach())
    with pytest.raises(ValueError, match="decay must lie"):
        momentum_update(generator.norm_mom, model.norms[0], 1.5)
    with pytest.raises(ValueError, match="other names or shapes"):
        momentum_update(generator.norm_mom, model.norms[1], 0.5)


def test_a_mask_trains_the_generator_but_not_its_copy():
    model = ViS4mer(VIS4MER).train()
    tokens = torch.randn(3, 24, 8)
    logits = model.keep_logits(model.encode(tokens))
    assert logits is not None
    mask = ops.gumbel_keep(logits, generator=torch.Generator().manual_seed(0))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    model(tokens, mask).square().sum().backward()
    generator = model.mask_generator
    assert generator is not None
    assert generator.linear.weight.grad is not None
    assert bool(generator.linear.weight.grad.abs().sum() > 0)
    assert all(p.grad is None for p in generator.s4_mom.parameters())
    assert all(p.grad is None for p in generator.norm_mom.parameters())


def test_a_full_mask_is_the_plain_model_and_masked_tokens_do_not_matter():
    model = spread(ViS4mer(VIS4MER))
    tokens = torch.randn(2, 24, 8)
    assert torch.equal(model(tokens, torch.ones(2, 24)), model(tokens))
    mask = (torch.arange(24) % 3 > 0).float().expand(2, -1)
    other = tokens + 5 * torch.randn(2, 24, 8) * (1 - mask[..., None])
    torch.testing.assert_close(model(tokens, mask), model(other, mask))
    assert not torch.allclose(model(tokens), model(other))


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.numel())
        return out


def test_memory_is_linear_in_the_length():
    model = ViS4mer(VIS4MER).eval()
    most = []
    for length in (512, 1024):
        with torch.no_grad(), Largest() as seen:
            model(torch.zeros(1, length, 8))
            model.keep_logits(model.encode(torch.zeros(1, length, 8)))
        most.append(seen.most)
    assert most[1] <= 2.1 * most[0] and most[1] < 1024 * 1024
