"""Linear recurrences, selective scans with gaps, and state-space convolutions."""

from __future__ import annotations

import pytest
import torch

from foveate import ops
from foveate.ops import _recurrence


def by_hand(decay: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    state, states = torch.zeros_like(added[0]), []
    for step in range(len(added)):
        state = decay[step] * state + added[step]
        states.append(state)
    return torch.stack(states)


@pytest.fixture(params=["loop", "chunks"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute a recurrence, whatever its size."""
    choose(monkeypatch, request.param)
    return request.param


def choose(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    for name in ("_LOOP_FROM", "_SCAN_FROM"):
        monkeypatch.setattr(_recurrence, name, 0 if form == "loop" else 1 << 60)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 16, 17, 257])
def test_recurrence_is_that_of_one_step_after_another(length, dtype, form):
    generator = torch.Generator().manual_seed(length)
    decay = torch.rand(length, 3, 2, generator=generator, dtype=dtype) / 2**0.5
    added = torch.randn(length, 3, 2, generator=generator, dtype=dtype)
    torch.testing.assert_close(ops.linear_recurrence(decay, added), by_hand(decay, added))


def test_recurrence_of_no_steps_and_of_mixed_types(form):
    assert ops.linear_recurrence(torch.ones(0, 3), torch.ones(0, 3)).shape == (0, 3)
    decay = torch.full((4,), 0.5j)
    found = ops.linear_recurrence(decay, torch.ones(4))
    torch.testing.assert_close(found, by_hand(decay, torch.ones(4) + 0j))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_recurrence_has_the_gradients_of_the_loop(length, dtype, form):
    torch.manual_seed(length)
    decay = torch.rand(length, 2, dtype=dtype, requires_grad=True)
    added = torch.randn(length, 2, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(ops.linear_recurrence, (decay, added))
    assert torch.autograd.gradgradcheck(ops.linear_recurrence, (decay, added))
    weight = torch.randn(length, 2, dtype=dtype)
    each = (ops.linear_recurrence, by_hand)
    mine, loop = (
        torch.autograd.grad(
            (of(decay, added) * weight).sum().abs(), (decay, added), allow_unused=True
        )
        for of in each
    )
    torch.testing.assert_close(mine[1], loop[1])
    if length > 1:
        torch.testing.assert_close(mine[0], loop[0])


def test_gradient_of_the_inputs_alone(form):
    added = torch.randn(5, 2, requires_grad=True)
    decay = torch.full((5, 2), 0.5)
    (found,) = torch.autograd.grad(ops.linear_recurrence(decay, added).sum(), added)
    torch.testing.assert_close(found[:, 0], 2 - 0.5 ** torch.arange(4.0, -1, -1))


def test_recurrence_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"input must have shape \(4, 2\)"):
        ops.linear_recurrence(torch.ones(4, 2), torch.ones(4))


def inputs(length: int = 23, B: int = 2, E: int = 4, S: int = 3):
    draw = torch.Generator().manual_seed(0)

    def of(*shape):
        return torch.randn(*shape, generator=draw)

    return {
        "u_BEL": of(B, E, length),
        "delta_BEL": of(B, E, length),
        "A_ES": -torch.rand(E, S, generator=draw) * 2,
        "B_BSL": of(B, S, length),
        "C_BSL": of(B, S, length),
        "D_E": of(E),
        "z_BEL": of(B, E, length),
        "delta_bias_E": of(E),
    }


def test_gaps_are_steps_without_input():
    """The short form and the full length with zeros at dropped places (raw step size 0) agree."""
    full = inputs()
    kept = torch.tensor([2, 3, 7, 8, 9, 15, 22])
    gone = torch.ones(23, dtype=torch.bool).index_fill(0, kept, False)
    empty = dict(full)
    empty["u_BEL"] = full["u_BEL"].masked_fill(gone, 0.0)
    empty["delta_BEL"] = full["delta_BEL"].masked_fill(gone, 0.0)
    dense = ops.selective_scan(**empty)[..., kept]
    short = {k: v[..., kept] if k[-1] == "L" else v for k, v in full.items()}
    order, gap = ops.path_gaps(torch.arange(23)[None], kept.expand(2, -1))
    assert order[0, 0].tolist() == list(range(7))
    assert gap[0, 0].tolist() == [2, 0, 3, 0, 0, 5, 6]
    found = ops.selective_scan(**short, gap_BL=gap[0])
    assert (found - dense).abs().max() < 1e-6
    naive = ops.selective_scan(**short)
    assert (naive - dense).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 3])
def test_scan_has_first_and_second_derivatives(length, form):
    given = {k: v.double().requires_grad_() for k, v in inputs(length, 2, 2, 2).items()}
    gap = torch.arange(length).expand(2, -1)

    def scan(*values):
        return ops.selective_scan(**dict(zip(given, values, strict=True)), gap_BL=gap)

    values = tuple(given.values())
    assert torch.autograd.gradcheck(scan, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(scan, values, fast_mode=True)


def test_both_ways_to_scan_agree_with_and_without_gradients(monkeypatch):
    given = {k: v.requires_grad_() for k, v in inputs().items()}
    gap = torch.arange(23).expand(2, -1) % 3
    found = []
    for way in ("loop", "chunks"):
        choose(monkeypatch, way)
        y = ops.selective_scan(**given, gap_BL=gap)
        with torch.inference_mode():
            assert torch.equal(ops.selective_scan(**given, gap_BL=gap), y)
        found.append((y, *torch.autograd.grad(y.square().sum(), tuple(given.values()))))
    for loop, chunks in zip(*found, strict=True):
        torch.testing.assert_close(loop, chunks, rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one(form):
    given = inputs()
    given["A_ES"].requires_grad_()
    y = ops.selective_scan(**given)
    (found,) = torch.autograd.grad(y.sum(), given["A_ES"], create_graph=True)
    assert found.shape == given["A_ES"].shape and bool(found.abs().sum() > 0)


def test_a_scan_of_no_steps_or_no_images(form):
    for length, B in ((0, 2), (4, 0)):
        assert ops.selective_scan(**inputs(length, B)).shape == (B, 4, length)


def test_what_comes_before_the_first_gap_is_as_in_the_full_scan():
    full = inputs()
    kept = torch.tensor([0, 1, 2, 3, 9, 12])
    short = {k: v[..., kept] if k[-1] == "L" else v for k, v in full.items()}
    _, gap = ops.path_gaps(torch.arange(23)[None], kept.expand(2, -1))
    found = ops.selective_scan(**short, gap_BL=gap[0])
    torch.testing.assert_close(found[..., :4], ops.selective_scan(**full)[..., :4])
    assert not torch.allclose(found[..., 4:], ops.selective_scan(**full)[..., kept[4:]])


@pytest.mark.parametrize("seed", range(3))
def test_stepping_over_unimportant_steps_is_nearer_to_the_full_scan(seed):
    """Smooth inputs that swell and fade; the faint half of them is dropped."""
    draw = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 4, 80)
    swell = (time * 5 + seed).sin().clamp_min(0) + 0.02
    u = swell * (time + torch.rand(1, 6, 1, generator=draw) * 6).sin()
    options = {
        "A_ES": -torch.rand(6, 4, generator=draw) * 3,
        "delta_bias_E": torch.full((6,), -2.0),
    }
    B, C = torch.rand(2, 1, 4, 80, generator=draw)
    dense = ops.selective_scan(u, torch.zeros_like(u), B_BSL=B, C_BSL=C, **options)
    kept = ops.top_k(swell, 40)
    _, gap = ops.path_gaps(torch.arange(80)[None], kept[None])
    short = {"B_BSL": B[..., kept], "C_BSL": C[..., kept], **options}
    x, step = u[..., kept], torch.zeros(1, 6, 40)
    aligned = ops.selective_scan(x, step, gap_BL=gap[0], **short)
    naive = ops.selective_scan(x, step, **short)
    truth = dense[..., kept]
    assert (aligned - truth).norm() < 0.5 * (naive - truth).norm()


def test_stepping_over_steps_that_say_as_much_as_others_is_no_nearer():
    """The limit of it, as the documentation has it: every second step of a steady input."""
    options = {"A_ES": -torch.ones(1, 1), "delta_bias_E": torch.zeros(1)}
    one = torch.ones(1, 1, 64)
    dense = ops.selective_scan(one, 0 * one, B_BSL=one, C_BSL=one, **options)
    half = one[..., ::2]
    _, gap = ops.path_gaps(torch.arange(64)[None], torch.arange(0, 64, 2)[None])
    short = {"B_BSL": half, "C_BSL": half, **options}
    aligned = ops.selective_scan(half, 0 * half, gap_BL=gap[0], **short)
    naive = ops.selective_scan(half, 0 * half, **short)
    truth = dense[..., ::2]
    assert (naive - truth).norm() < (aligned - truth).norm()


def test_reversing_the_sequence_swaps_the_directions():
    ranks = torch.stack([torch.arange(9), torch.arange(9).flip(0)])
    place = torch.tensor([[0, 3, 4, 8]])
    mirrored = (8 - place).flip(1)
    order, gap = ops.path_gaps(ranks, place)
    swapped, other = ops.path_gaps(ranks, mirrored)
    assert torch.equal(gap[0], other[1]) and torch.equal(gap[1], other[0])
    assert torch.equal(place.gather(1, order[1]), 8 - mirrored.gather(1, swapped[0]))


def test_serpentines_step_to_neighbours_and_each_has_gaps_of_its_own():
    ranks = ops.serpentine_ranks(4, 5)
    for path in ranks:
        cells = path.argsort()
        row, column = cells // 5, cells % 5
        assert bool(((row.diff().abs() + column.diff().abs()) == 1).all())
    place = torch.arange(20)[torch.arange(20) % 3 > 0][None]
    _, gaps = ops.path_gaps(ranks, place)
    assert len({tuple(path[0].tolist()) for path in gaps}) == 4
    last = torch.gather(ranks[:, place[0]].sort(-1).values, 1, torch.tensor([[-1 % 13]] * 4))
    assert torch.equal(gaps.sum(-1), last - 12)  # all places up to the last kept one


def test_half_precision_and_bad_shapes():
    half = {k: v.bfloat16() for k, v in inputs().items()}
    found = ops.selective_scan(**half)
    assert found.dtype == torch.bfloat16
    expected = ops.selective_scan(**{k: v.float() for k, v in half.items()})
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    wrong = inputs() | {"B_BSL": torch.zeros(2, 2, 23)}
    with pytest.raises(ValueError, match="B must have shape"):
        ops.selective_scan(**wrong)


# -- diagonal state spaces ------------------------------------------------------------------------


def state_space(D: int = 5, n: int = 4, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float64)
    real = -torch.rand(D, n, generator=draw, dtype=wide) * 0.3
    rate = torch.complex(real, torch.rand(D, n, generator=draw, dtype=wide))
    weight = torch.complex(*torch.randn(2, D, n, generator=draw, dtype=wide))
    kind = torch.complex128 if dtype == torch.float64 else torch.complex64
    return rate.to(kind), weight.to(kind)


def test_convolution_equals_the_recurrence():
    rate, weight = state_space()
    x = torch.randn(2, 5, 257, generator=torch.Generator().manual_seed(2))
    convolved = ops.fft_convolve(x, ops.diagonal_kernel(rate, weight, 257))
    torch.testing.assert_close(
        ops.diagonal_recurrence(x, rate, weight), convolved, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("length", [1, 2, 3, 16, 23, 257])
def test_kernel_is_the_sum_of_powers(length):
    rate, weight = state_space(dtype=torch.float64)
    step = torch.arange(length)
    expected = 2 * (weight[..., None] * (rate[..., None] * step).exp()).sum(1).real
    torch.testing.assert_close(ops.diagonal_kernel(rate, weight, length), expected)


def test_kernel_is_evaluated_at_the_true_distances():
    rate, weight = state_space(dtype=torch.float64)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    place = torch.tensor([[0, 1, 4, 5, 9, 20, 21, 30, 31], [3, 5, 6, 7, 8, 11, 12, 13, 39]])
    kernel = ops.diagonal_kernel(rate, weight, 40)
    expected = torch.zeros_like(x)
    for b in range(2):
        for i in range(9):
            for j in range(i + 1):
                expected[b, :, i] += kernel[:, place[b, i] - place[b, j]] * x[b, :, j]
    found = ops.diagonal_recurrence(x, rate, weight, place)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_channels_in_parts_are_the_same(monkeypatch):
    from foveate.ops import state_space as module

    rate, weight = state_space()
    x = torch.randn(2, 5, 33)
    whole = ops.diagonal_recurrence(x, rate, weight)
    monkeypatch.setattr(module, "_NUMBERS", 2 * 33 * 4 * 2)  # two channels at a time
    assert torch.equal(ops.diagonal_recurrence(x, rate, weight), whole)


def test_convolution_refuses_a_kernel_of_another_length():
    with pytest.raises(ValueError, match=r"kernel must have shape \(2, 8\)"):
        ops.fft_convolve(torch.zeros(1, 2, 8), torch.zeros(2, 7))
