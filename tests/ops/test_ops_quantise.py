"""Few-bit groups: bounds, sizes, and what stays exact; stretched rotary frequencies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.ops import attention_rows, ntk_base, ntk_frequencies, quantise


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def per_value(stored, like: torch.Tensor) -> torch.Tensor:
    """The step of every value."""
    size = like.shape[stored.dim] // stored.step.shape[stored.dim]
    return stored.step.repeat_interleave(size, stored.dim)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("offset", [0.0, 0.7, -40.0, 3000.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 50.0])
def test_the_error_is_at_most_half_a_step(dim, bits, offset, spread):
    x = offset + spread * normal(2, 3, 128, 64)
    stored = quantise(x, bits=bits, group=64, dim=dim)
    error = (stored.dequantise() - x).abs()
    step = per_value(stored, x)
    assert (error <= 0.5 * step * (1 + 1e-4) + 1e-6 * x.abs()).all()
    # And the step is what the range asks for: 9 % for the byte, or 1/127 of a far offset.
    grouped = x.unflatten(dim, (-1, 64))
    span = (grouped.amax(dim) - grouped.amin(dim)) / (2**bits - 1)
    far = grouped.amin(dim).abs() / 127
    assert (stored.step <= 1.0906 * torch.maximum(span, far)).all()


@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8]),
    other=st.integers(1, 7),
    dim=st.sampled_from([-1, -2]),
    seed=st.integers(0, 99),
)
def test_any_shape_comes_back(rows, groups, group, other, dim, seed):
    shape = (rows, groups * group, other) if dim == -2 else (rows, other, groups * group)
    x = normal(*shape, seed=seed)
    stored = quantise(x, bits=2, group=group, dim=dim)
    back = stored.dequantise(torch.float16)
    assert back.shape == x.shape and back.dtype == torch.float16
    assert ((stored.dequantise() - x).abs() <= 0.51 * per_value(stored, x)).all()
    # What is stored is what is read: storing it again changes next to nothing.
    again = quantise(stored.dequantise(), bits=2, group=group, dim=dim).dequantise()
    assert ((again - stored.dequantise()).abs() <= 0.56 * per_value(stored, x)).all()


def test_special_groups():
    x = torch.stack([torch.zeros(8), torch.full((8,), 2.5), torch.arange(8) // 2 * 1.0])
    back = quantise(x, group=8).dequantise()
    assert torch.equal(back[0], x[0])
    torch.testing.assert_close(back[1], x[1], atol=0, rtol=0.005)
    assert torch.equal(back[2], x[2])
    wide = torch.tensor([[-60000.0, 0.0, 1.0, 65504.0]])
    assert ((quantise(wide, group=4).dequantise() - wide).abs() <= 0.5 * 1.0906 * 125504 / 3).all()


@pytest.mark.parametrize("dim", [-1, -2])
def test_two_bits_take_less_than_a_seventh_of_sixteen(dim):
    x = normal(1, 8, 1024, 128).half()
    stored = quantise(x, bits=2, group=64, dim=dim)
    assert stored.nbytes == x.numel() // 4 + 2 * x.numel() // 64
    assert stored.nbytes <= x.nbytes / 7
    assert quantise(x, bits=4, group=64, dim=dim).nbytes <= x.nbytes / 3.7


def test_attention_over_stored_keys_and_values_stays_close():
    q, k, v = normal(1, 4, 32, 64), normal(1, 4, 512, 64, seed=1), normal(1, 4, 512, 64, seed=2)
    k = k + 2 * normal(1, 4, 1, 64, seed=3)  # channels have means, as keys do
    v = v + normal(1, 4, 1, 64, seed=4)

    def attend(keys, values):
        rows = attention_rows(q, keys, scale=64**-0.5, row_positions=None)
        return rows @ values

    stored_k = quantise(k, group=64, dim=-2).dequantise()
    stored_v = quantise(v, group=64, dim=-1).dequantise()
    cosine = torch.cosine_similarity(attend(k, v), attend(stored_k, stored_v), dim=-1)
    assert cosine.min() > 0.95


def test_keys_need_their_own_axis():
    """An outlier channel costs the others nothing when groups lie along tokens."""
    k = normal(1, 1, 128, 64)
    k[..., 5] *= 100
    errors = {}
    for dim in (-1, -2):
        back = quantise(k, group=64, dim=dim).dequantise()
        errors[dim] = (back - k)[..., :5].abs().mean()
    assert errors[-2] < 0.6 * errors[-1]


def test_bad_quantisation_is_refused():
    for given_, match in (
        ({"bits": 3}, "bits must be"),
        ({"dim": 0}, "dim -1 or -2"),
        ({"group": 5}, "does not divide"),
        ({"group": 0}, "does not divide"),
    ):
        with pytest.raises(ValueError, match=match):
            quantise(torch.zeros(4, 8), **{"group": 8, **given_})


def test_published_base():
    assert round(ntk_base(10000.0, 2.0, 128)) == 20221
    assert ntk_base(10000.0, 1.0, 128) == 10000.0


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 8.0])
@pytest.mark.parametrize("dim", [4, 64, 128])
def test_frequencies_are_those_of_the_new_base(scale, dim):
    place = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    own = 10000.0**-place
    got = ntk_frequencies(own, scale)
    torch.testing.assert_close(got, ntk_base(10000.0, scale, dim) ** -place, atol=0, rtol=1e-12)
    assert got[0] == 1 and got[-1] == own[-1] / scale
    assert torch.equal(ntk_frequencies(own, 1.0), own)
    assert ntk_frequencies(own.float(), scale).dtype == torch.float32


def test_bad_stretching_is_refused():
    for scale, dim in ((0.5, 128), (float("nan"), 128), (2.0, 2)):
        with pytest.raises(ValueError, match="at least 1 and more than 2"):
            ntk_base(10000.0, scale, dim)
    with pytest.raises(ValueError, match="at least 1"):
        ntk_frequencies(torch.ones(4), 0.9)
