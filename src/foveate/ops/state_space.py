"""Diagonal linear state spaces (S4D): convolution with their kernel, and the same as a recurrence.

Legend of shape suffixes: B batch, D channels, n pairs of conjugate states of a channel, L steps, K
kept tokens, C chunks of c steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.ops._common import full_precision, require_dims, require_shape, widen
from foveate.ops.scan import linear_recurrence

#: Numbers of the state of every step that exist at once in the recurrence.
_NUMBERS = 2**25


def diagonal_kernel(rate_Dn: Tensor, weight_Dn: Tensor, length: int) -> Tensor:
    """The convolution kernel `K_l = 2 Re sum_n weight_n exp(l rate_n)`, float [D, L].

    O(D n L) in matrix products, and O(D n sqrt(L)) exponentials: `l = i c + j` splits every power
    into one for i and one for j.

    Args:
        rate_Dn: complex, step size times the diagonal of A; real part below 0.
        weight_Dn: complex, output matrix times discretised input matrix.
        length: L.

    Example:
        >>> rate = torch.tensor([[-0.5 + 0.0j]])
        >>> diagonal_kernel(rate, torch.tensor([[0.5 + 0.0j]]), 3).tolist()[0][0]
        1.0

    Source: S4D (arXiv 2206.11893), section 3.
    """
    require_shape(weight_Dn, tuple(rate_Dn.shape), "weight")
    size = max(1, math.isqrt(length))
    step_c = torch.arange(size, device=rate_Dn.device)
    start_C = torch.arange(0, length, size, device=rate_Dn.device)
    within_Dnc = (rate_Dn[..., None] * step_c).exp()
    start_DnC = weight_Dn[..., None] * (rate_Dn[..., None] * start_C).exp()
    kernel_DCc = 2 * (start_DnC.transpose(1, 2) @ within_Dnc).real
    return kernel_DCc.flatten(1)[:, :length]


def fft_convolve(x_BDL: Tensor, kernel_DL: Tensor) -> Tensor:
    """Causal convolution of every channel with its kernel, float [B, D, L]. O(B D L log L).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> x, kernel = torch.tensor([[[1.0, 0.0, 2.0]]]), torch.tensor([[1.0, 0.5, 0.25]])
        >>> [round(value, 4) for value in fft_convolve(x, kernel).flatten().tolist()]
        [1.0, 0.5, 2.25]
    """
    require_dims(x_BDL, 3, "x", "[B, D, L]")
    require_shape(kernel_DL, tuple(x_BDL.shape[1:]), "kernel")
    length = x_BDL.shape[2]
    with full_precision(x_BDL.device):
        # Twice the length, or the end of the sequence would wrap round to its start.
        spectrum = torch.fft.rfft(widen(x_BDL), n=2 * length)
        spectrum = spectrum * torch.fft.rfft(widen(kernel_DL), n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length].to(x_BDL.dtype)


def diagonal_recurrence(
    x_BDK: Tensor, rate_Dn: Tensor, weight_Dn: Tensor, place_BK: Tensor | None = None
) -> Tensor:
    """The same convolution as a recurrence over tokens that may lie at any places in time.

    `y_i = sum over j <= i of K(place_i - place_j) x_j`: the kernel at the true distances, without
    a K x K matrix. Channels run in parts, so memory is bounded. O(B D n K).

    Args:
        x_BDK: input.
        rate_Dn: complex, step size times the diagonal of A.
        weight_Dn: complex, as in `diagonal_kernel`.
        place_BK: [B, K] ascending times in steps; None: one step after another.

    Returns:
        float [B, D, K].

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> rate, weight = torch.tensor([[-0.1 + 1.0j]]), torch.tensor([[1.0 + 0.5j]])
        >>> x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
        >>> dense = fft_convolve(x, diagonal_kernel(rate, weight, 4))[..., [0, 3]]
        >>> sparse = diagonal_recurrence(x[..., [0, 3]], rate, weight, torch.tensor([[0, 3]]))
        >>> torch.allclose(dense, sparse, atol=1e-5)
        True
    """
    require_dims(x_BDK, 3, "x", "[B, D, K]")
    B, D, K = x_BDK.shape
    require_shape(rate_Dn, (D, rate_Dn.shape[-1]), "rate")
    require_shape(weight_Dn, tuple(rate_Dn.shape), "weight")
    if place_BK is None:
        place_BK = torch.arange(K, device=x_BDK.device).expand(B, K)
    require_shape(place_BK, (B, K), "place")
    with full_precision(x_BDK.device):
        # Nothing comes before the first token, so what it decays by does not matter.
        gap_KB = place_BK.diff(dim=1, prepend=place_BK[:, :1]).T.to(widen(x_BDK[..., :0]).dtype)
        part = max(1, _NUMBERS // max(1, B * K * rate_Dn.shape[1]))
        outs = []
        for start in range(0, D, part):
            channels = slice(start, start + part)
            rate_dn, weight_dn = rate_Dn[channels], weight_Dn[channels]
            decay_KBdn = (gap_KB[..., None, None] * rate_dn).exp()
            x_KBd1 = widen(x_BDK[:, channels]).permute(2, 0, 1)[..., None]
            state_KBdn = linear_recurrence(decay_KBdn, x_KBd1.expand_as(decay_KBdn) + 0j)
            outs.append(2 * (state_KBdn * weight_dn).sum(-1).real)
        return torch.cat(outs, 2).permute(1, 2, 0).to(x_BDK.dtype)
