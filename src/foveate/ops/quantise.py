"""Few-bit integers with one step and one zero point per group of values.

Legend: ... leading sizes, T tokens, d channels, P bytes that hold d codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

_INT8 = 127
#: The steps that one byte can name: eight to a factor of two. A table, and not exp2, so that every
#: device and every shape has the same bits.
_STEPS = tuple(2.0 ** (exponent / 8) for exponent in range(-128, 128))


@dataclass(frozen=True, eq=False)
class Quantised:
    """Values as `(code + zero) * step`, with one byte for the step and one for the zero per group.

    Attributes:
        codes: uint8 [..., T, P], several codes a byte, the first in the lowest bits.
        zero: int8, the lowest code's value in steps, per group.
        exponent: int8, the step is 2 ** (exponent / 8), per group.
        bits: of a code.
        dim: the axis that groups lie along, -1 or -2; `zero` and `exponent` are shorter there.
        num_channels: d.

    Example:
        >>> stored = quantise(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), bits=2, group=4)
        >>> stored.codes.tolist(), stored.zero.tolist(), stored.step.tolist()
        ([[228]], [[0]], [[1.0]])
    """

    codes: torch.Tensor
    zero: torch.Tensor
    exponent: torch.Tensor
    bits: int
    dim: int
    num_channels: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.codes.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, zeros and steps."""
        return self.codes.nbytes + self.zero.nbytes + self.exponent.nbytes

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, zeros and exponents; their axis -2 follows the tokens or groups of tokens."""
        return self.codes, self.zero, self.exponent

    def with_parts(
        self, codes: torch.Tensor, zero: torch.Tensor, exponent: torch.Tensor
    ) -> Quantised:
        """The same format around other tensors."""
        return replace(self, codes=codes, zero=zero, exponent=exponent)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values [..., T, d]; O(T d)."""
        per_byte = 8 // self.bits
        shift = torch.arange(per_byte, dtype=torch.uint8, device=self.codes.device) * self.bits
        codes = (self.codes[..., None] >> shift) & (2**self.bits - 1)
        codes = codes.flatten(-2)[..., : self.num_channels].float()
        group = codes.shape[self.dim] // max(self.zero.shape[self.dim], 1)
        grouped = codes.unflatten(self.dim, (-1, max(group, 1)))
        # Behind the axis that was split, counted from the end, lies the axis within a group.
        zero, step = self.zero.unsqueeze(self.dim).float(), self.step.unsqueeze(self.dim)
        return ((grouped + zero) * step).flatten(self.dim - 1, self.dim).to(dtype)

    @property
    def step(self) -> torch.Tensor:
        """The distance between two codes, float32, per group."""
        return _steps(self.exponent.device)[self.exponent.int() + 128]


def quantise(x: torch.Tensor, *, bits: int = 2, group: int = 64, dim: int = -1) -> Quantised:
    """Round every value to a multiple of its group's step; the error is at most half a step.

    The step is a third (at 2 bits) of the group's range, rounded up by at most 9 % to fit a byte. A
    group that lies further from zero than 127 steps gets a larger step, 1/127 of that distance.
    O(T d).

    Args:
        x: [..., T, d].
        bits: of a code, 2 or 4.
        group: values that share a step.
        dim: the axis that groups lie along: -1 for groups of channels of one token, -2 for groups
            of tokens in one channel. It must divide into groups.

    Raises:
        ValueError: other bits or axes, or an axis that does not divide into groups.

    Example:
        >>> x = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
        >>> small = quantise(x, bits=2, group=4)
        >>> small.nbytes, small.dequantise().tolist()
        (3, [[-1.0, 0.0, 0.0, 2.0]])
    """
    if bits not in (2, 4) or dim not in (-1, -2):
        raise ValueError(f"bits must be 2 or 4 and dim -1 or -2, got bits={bits}, dim={dim}.")
    if group < 1 or x.dim() < 2 or x.shape[dim] % group:
        raise ValueError(
            f"{tuple(x.shape)} does not divide into groups of {group} along axis {dim}."
        )
    levels = 2**bits - 1
    within = dim  # unflattened, the axis within a group takes the old one's place from the end
    grouped = x.detach().float().unflatten(dim, (-1, group))
    low, high = grouped.amin(within), grouped.amax(within)
    wanted = torch.maximum((high - low) / levels, low.abs() / _INT8)
    table = _steps(x.device)
    place = torch.searchsorted(table, wanted.contiguous()).clamp(max=len(_STEPS) - 1)
    step, exponent = table[place], place - 128
    zero = (low / step).round().clamp(-_INT8, _INT8)
    codes = (grouped / step.unsqueeze(within)).round() - zero.unsqueeze(within)
    codes = codes.clamp(0, levels).to(torch.uint8).flatten(dim - 1, dim)
    return Quantised(
        _packed(codes, bits), zero.to(torch.int8), exponent.to(torch.int8), bits, dim, x.shape[-1]
    )


def _steps(device: torch.device) -> torch.Tensor:
    return torch.tensor(_STEPS, device=device)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes side by side in bytes, along the last axis."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    codes = codes.unflatten(-1, (-1, per_byte))
    shift = torch.arange(per_byte, dtype=torch.uint8, device=codes.device) * bits
    return (codes << shift).sum(-1).to(torch.uint8)
