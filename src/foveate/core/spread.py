"""Transforms in which most tokens pass alone and a few are spread over those that stay.

Legend: B batch, N source tokens, M target tokens, R tokens that are spread, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from foveate.core._rows import as_channels, column_shares, strongest, take_rows
from foveate.core.reduction import Reduction


@dataclass(frozen=True, eq=False, repr=False)
class Spread(Reduction):
    """A transform whose target i is `own_i * anchor_i + sum_r weight_ir * spread_r`.

    The same as `Reduction.transform` with that matrix, in O(M R D) in place of O(M N D). Behind an
    earlier reduction it is a `SpreadChain`. Make one with `spread`.

    Example:
        >>> anchor_BM, spread_BR = torch.tensor([[0, 2]]), torch.tensor([[1]])
        >>> made = spread(3, anchor_BM, spread_BR, torch.tensor([[[0.5], [0.5]]]))
        >>> made.matrix().tolist()
        [[[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]]
        >>> made.apply(torch.tensor([[[2.0], [4.0], [6.0]]])).flatten().tolist()
        [4.0, 8.0]
    """

    spread_BR: torch.Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.long))
    weight_BMR: torch.Tensor = field(default_factory=lambda: torch.empty(1, 0, 0))
    own_BM: torch.Tensor | None = None

    def apply(self, x_BN: torch.Tensor) -> torch.Tensor:
        """Reduce anything indexed like the tokens, [B, N, ...] -> [B, M, ...]; see `Reduction`."""
        self._check_source(x_BN)
        kept_BMD = as_channels(take_rows(x_BN, self.anchor_BM))
        gone_BRD = as_channels(take_rows(x_BN, self.spread_BR))
        dtype = torch.promote_types(x_BN.dtype, torch.float32)
        kept_BMD = kept_BMD.to(dtype)
        if self.own_BM is not None:
            kept_BMD = kept_BMD * self.own_BM[..., None].to(dtype)
        # Added in place: these rows are copies, and one more of them all costs as much as the sum.
        out_BMD = kept_BMD.baddbmm_(self.weight_BMR.to(dtype), gone_BRD.to(dtype))
        return out_BMD.to(x_BN.dtype).reshape(self.batch, self.num_out, *x_BN.shape[2:])

    def sizes(self, size_BN: torch.Tensor) -> torch.Tensor:
        """How many source tokens every target stands for; see `Reduction.sizes`."""
        self._check_source(size_BN)
        size_BN = size_BN if size_BN.is_floating_point() else size_BN.float()
        if not self.conserve:
            return self.apply(size_BN)
        gone_BR = size_BN.gather(1, self.spread_BR)
        return size_BN.gather(1, self.anchor_BM) + column_shares(self.weight_BMR, gone_BR)

    @property
    def groups_BN(self) -> torch.Tensor:
        """Which target holds each source token; see `Reduction.groups_BN`."""
        return strongest(self._dense(), dim=1)

    def sample(self, index: int) -> Reduction:
        """One sample of the batch (B = 1).

        Raises:
            ValueError: there is no such sample.
        """
        if not 0 <= index < self.batch:
            raise ValueError(f"There is no sample {index} in a batch of {self.batch}.")
        row = slice(index, index + 1)
        return spread(
            self.num_in,
            self.anchor_BM[row],
            self.spread_BR[row],
            self.weight_BMR[row],
            None if self.own_BM is None else self.own_BM[row],
            self.conserve,
        )

    def to(self, device: torch.device | str) -> Reduction:
        """The same reduction with its tensors on `device`."""
        own_BM = None if self.own_BM is None else self.own_BM.to(device)
        return spread(
            self.num_in,
            self.anchor_BM.to(device),
            self.spread_BR.to(device),
            self.weight_BMR.to(device),
            own_BM,
            self.conserve,
        )

    def _behind(
        self, earlier: Reduction, anchor_BM: torch.Tensor, mask_BM: torch.Tensor | None
    ) -> Reduction:
        made = SpreadChain(
            "transform",
            earlier.num_in,
            anchor_BM,
            mask_BM,
            conserve=earlier.conserve and self.conserve,
        )
        so_far = getattr(earlier, "steps", ()) or (earlier,)
        object.__setattr__(made, "steps", (*so_far, self))
        return made

    def _product(self, earlier: Reduction) -> torch.Tensor:
        return self.apply(earlier.matrix())

    def _dense(self) -> torch.Tensor:
        B, M, N = self.batch, self.num_out, self.num_in
        matrix_BMN = self.weight_BMR.new_zeros(B, M, N)
        spread_BMR = self.spread_BR[:, None].expand(-1, M, -1)
        matrix_BMN.scatter_(2, spread_BMR, self.weight_BMR)
        own_BM = self.weight_BMR.new_ones(B, M) if self.own_BM is None else self.own_BM
        return matrix_BMN.scatter_(2, self.anchor_BM[..., None], own_BM[..., None])


class SpreadChain(Reduction):
    """A reduction and spreads behind it as one transform, whose matrix is made when asked for.

    An encoder that spreads tokens in every block so joins each to the others in O(M). The matrix
    costs O(M R N) per spread.

    Attributes:
        steps: in order; empty once the matrix is there, which is kept in their place.

    Example:
        >>> half = torch.full((1, 2, 1), 0.5)
        >>> one = spread(3, torch.tensor([[0, 2]]), torch.tensor([[1]]), half)
        >>> two = spread(2, torch.tensor([[0]]), torch.tensor([[1]]), half[:, :1])
        >>> one.then(two).matrix().tolist()
        [[[1.0, 0.75, 0.5]]]
    """

    steps: tuple[Reduction, ...] = ()
    _made: torch.Tensor | None = None

    def _matrix(self) -> torch.Tensor | None:
        if self._made is None:
            self._keep(_product_of(self.steps))
        return self._made

    def _keep(self, matrix_BMN: torch.Tensor | None) -> None:
        object.__setattr__(self, "_made", matrix_BMN)
        object.__setattr__(self, "steps", ())

    # Set by the constructor, that is by `dataclasses.replace`, and made at the first reading else.
    matrix_BMN = property(_matrix, _keep)  # pyright: ignore[reportAssignmentType]


def _product_of(steps: tuple[Reduction, ...]) -> torch.Tensor:
    """The matrix [B, M, N] of reductions behind one another.

    From the first on, so that it is the same to the bit whether or not somebody has asked for a
    part of it before.
    """
    first, *later = steps
    matrix_BMN = first.matrix()
    for step in later:
        matrix_BMN = step.apply(matrix_BMN)
    return matrix_BMN


def spread(
    num_in: int,
    anchor_BM: torch.Tensor,
    spread_BR: torch.Tensor,
    weight_BMR: torch.Tensor,
    own_BM: torch.Tensor | None = None,
    conserve: bool = True,
) -> Spread:
    """Keep some tokens and spread the others over them.

    Args:
        num_in: N.
        anchor_BM: tokens that stay, int64 [B, M].
        spread_BR: all others, int64 [B, R], R = N - M.
        weight_BMR: how much every target takes of each of those.
        own_BM: how much every target keeps of its own; None: all.
        conserve: see `Reduction.transform`.

    Raises:
        ValueError: the shapes do not fit.
    """
    (B, M), R = anchor_BM.shape, spread_BR.shape[1]
    own_shape = (B, M) if own_BM is None else tuple(own_BM.shape)
    fits = num_in == M + R and tuple(weight_BMR.shape) == (B, M, R) and own_shape == (B, M)
    if not fits or spread_BR.shape[0] != B:
        raise ValueError(
            f"spread of {num_in} tokens: anchors {tuple(anchor_BM.shape)} and spread tokens "
            f"{tuple(spread_BR.shape)} need weights {(B, M, R)}, got {tuple(weight_BMR.shape)}."
        )
    return Spread(
        "transform",
        num_in,
        anchor_BM,
        conserve=conserve,
        spread_BR=spread_BR,
        weight_BMR=weight_BMR,
        own_BM=own_BM,
    )
