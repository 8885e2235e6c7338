"""How N tokens became M: one type for selecting, merging, transforming and synthesising tokens.

Longer than most files here: the four forms of one value type answer the same questions, and apart
they would have to know each other anyway.

Legend: B batch, N source tokens, M target tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from foveate.core._checks import (
    as_anchors,
    as_index,
    as_mask,
    as_rows,
    check_range,
    check_shape,
    existing,
)
from foveate.core._rows import (
    as_channels,
    column_shares,
    drop_hidden,
    fill_rows,
    first_source,
    matmul,
    strongest,
    take_rows,
)
from foveate.ops.group import scatter_sum
from foveate.ops.weighted_sum import weighted_group_sum

ReductionKind = Literal["select", "merge", "transform", "synthesise"]


@dataclass(frozen=True, eq=False, repr=False)
class Reduction:
    """A linear map `Y = W X` from N source tokens to M target tokens, with provenance.

    Build one with `select`, `merge`, `transform`, `synthesise` or `identity`; the constructors
    check shapes, and on the CPU values. Ragged batches are padded: where a target does not exist
    `mask_BM` is False, `anchor_BM` is -1 and features are zero. A target that exists and has the
    anchor -1 has no provenance (a learned query, say).

    Attributes:
        kind: "select", "merge", "transform" or "synthesise".
        num_in: N.
        anchor_BM: int64 [B, M], the source token whose place (position, id, kind) a target takes;
            -1 for padding and for a target without provenance.
        mask_BM: bool [B, M], which targets exist; None when all do.
        assignment_BN: int64 [B, N], merge only: the target of each source, -1 when dropped.
        weight_BN: float [B, N], merge only: the weight of each source inside its target.
        matrix_BMN: [B, M, N], transform (or synthesise with provenance) only; may be sparse COO.
        features_BMD: [B, M, D], synthesise only.
        distinct: select only: no source is taken twice; None when nobody has looked.
        conserve: transform only: a source's size is shared among its targets; False: sizes are
            mixed like features.

    Example:
        >>> import torch
        >>> x_BND = torch.arange(8.0).view(1, 4, 2)
        >>> pick = Reduction.select(torch.tensor([[0, 3]]), num_in=4)
        >>> pick.apply(x_BND).tolist()
        [[[0.0, 1.0], [6.0, 7.0]]]
        >>> mean = Reduction.merge(torch.tensor([[0, 0, 1, -1]]), num_out=2)
        >>> mean.apply(x_BND).tolist()
        [[[1.0, 2.0], [4.0, 5.0]]]
        >>> mean.restore(mean.apply(x_BND)).tolist()[0][3]
        [0.0, 0.0]
        >>> mean.then(Reduction.select(torch.tensor([1]), num_in=2)).matrix().tolist()
        [[[0.0, 0.0, 1.0, 0.0]]]
    """

    kind: ReductionKind
    num_in: int
    anchor_BM: torch.Tensor
    mask_BM: torch.Tensor | None = None
    assignment_BN: torch.Tensor | None = None
    weight_BN: torch.Tensor | None = None
    matrix_BMN: torch.Tensor | None = None
    features_BMD: torch.Tensor | None = None
    distinct: bool | None = None
    conserve: bool = True

    def __repr__(self) -> str:
        padded = "" if self.mask_BM is None else ", padded"
        return f"Reduction({self.kind}, {self.batch} x ({self.num_in} -> {self.num_out}){padded})"

    # -- constructors ---------------------------------------------------------------------------

    @classmethod
    def identity(cls, num: int, batch: int = 1, device: torch.device | str = "cpu") -> Reduction:
        """Keep all `num` tokens of every sample."""
        index_N = torch.arange(num, device=device)
        return cls("select", num, index_N.expand(batch, num), distinct=True)

    @classmethod
    def select(
        cls, index_BM: torch.Tensor, num_in: int, mask_BM: torch.Tensor | None = None
    ) -> Reduction:
        """Keep the source tokens `index_BM`, in that order; an index may occur more than once.

        Args:
            index_BM: integers [M] or [B, M]; -1 marks padding of a ragged batch.
            num_in: N.
            mask_BM: bool [B, M], which targets exist (default: those whose index is not -1). What
                `index_BM` holds elsewhere does not matter.

        Raises:
            ValueError: an index is outside 0..N-1, the shape is not [M] or [B, M], or -1 occurs in
                a single sample without `mask_BM`.
        """
        index_BM = as_index(index_BM, "select: index")
        mask_BM = as_mask(mask_BM, (index_BM.shape[0], index_BM.shape[1]), "select")
        if mask_BM is not None:
            index_BM = index_BM.where(mask_BM, -1)
            mask_BM = mask_BM & (index_BM >= 0)
        check_range(index_BM, num_in, "select: index")
        if mask_BM is None:
            mask_BM = existing(index_BM, "select: index")
        return cls("select", num_in, index_BM, mask_BM)

    @classmethod
    def merge(
        cls,
        assignment_BN: torch.Tensor,
        num_out: int,
        weight_BN: torch.Tensor | None = None,
        anchor_BM: torch.Tensor | None = None,
        mask_BM: torch.Tensor | None = None,
        normalise: bool = True,
    ) -> Reduction:
        """Average the sources that share a target.

        Args:
            assignment_BN: integers [N] or [B, N], the target of each source; -1 drops the source.
            num_out: M.
            weight_BN: [B, N] weight of each source (default: all equal); at least float32 is kept.
            anchor_BM: [B, M] source whose place the target takes (default: its first source).
            mask_BM: bool [B, M], which targets of a ragged batch exist (default: all when anchors
                are given, else those that have a source). Sources of others are dropped.
            normalise: divide the weights by their sum per target; False takes them as they are.

        Raises:
            ValueError: a target index is outside -1..M-1, the shapes differ, or a target of a
                single sample has no source and neither anchor nor mask is given.
        """
        assignment_BN = as_index(assignment_BN, "merge: assignment")
        batch, num_in = assignment_BN.shape
        check_range(assignment_BN, num_out, "merge: assignment")
        mask_BM = as_mask(mask_BM, (batch, num_out), "merge")
        assignment_BN = drop_hidden(assignment_BN, mask_BM)
        if weight_BN is None:
            weight_BN = torch.ones(batch, num_in, device=assignment_BN.device)
        weight_BN = as_rows(weight_BN, "merge: weight").to(assignment_BN.device)
        check_shape(weight_BN, (batch, num_in), "merge: weights")
        # Sums of half-precision weights stop growing at 256 equal ones.
        weight_BN = weight_BN.to(torch.promote_types(weight_BN.dtype, torch.float32))
        weight_BN = weight_BN.masked_fill(assignment_BN < 0, 0.0)
        if normalise and num_out:
            total_BM = scatter_sum(weight_BN[..., None], assignment_BN, num_out)[..., 0]
            total_BN = total_BM.gather(1, assignment_BN.clamp(min=0))
            weight_BN = weight_BN / total_BN.masked_fill(total_BN == 0, 1.0)
        if anchor_BM is None:
            anchor_BM = first_source(assignment_BN, num_out)
            if mask_BM is None:
                mask_BM = existing(anchor_BM, "merge: target")
        anchor_BM = as_anchors(anchor_BM, (batch, num_out), num_in, mask_BM, "merge")
        return cls("merge", num_in, anchor_BM, mask_BM, assignment_BN, weight_BN)

    @classmethod
    def transform(
        cls,
        matrix_BMN: torch.Tensor,
        anchor_BM: torch.Tensor | None = None,
        mask_BM: torch.Tensor | None = None,
        conserve: bool = True,
    ) -> Reduction:
        """Mix tokens with a general matrix.

        Args:
            matrix_BMN: dense or sparse COO, [M, N] or [B, M, N].
            anchor_BM: [B, M] source whose place the target takes (default: the source of largest
                absolute weight, lowest index on ties; -1 where all are zero).
            mask_BM: bool [B, M], which targets of a ragged batch exist (default: all).
            conserve: share each source's size among its targets, so that no size is lost or made;
                False mixes sizes like features.

        Raises:
            ValueError: the shapes do not fit or an anchor is outside -1..N-1.
        """
        if matrix_BMN.dim() == 2:
            matrix_BMN = matrix_BMN.unsqueeze(0)
        if matrix_BMN.dim() != 3:
            raise ValueError(f"transform: matrix must be [B, M, N], got {tuple(matrix_BMN.shape)}.")
        batch, num_out, num_in = matrix_BMN.shape
        mask_BM = as_mask(mask_BM, (batch, num_out), "transform")
        if anchor_BM is None:
            anchor_BM = strongest(matrix_BMN, dim=2)
        anchor_BM = as_anchors(anchor_BM, (batch, num_out), num_in, mask_BM, "transform")
        return cls(
            "transform", num_in, anchor_BM, mask_BM, matrix_BMN=matrix_BMN, conserve=conserve
        )

    @classmethod
    def synthesise(
        cls,
        features_BMD: torch.Tensor,
        num_in: int,
        matrix_BMN: torch.Tensor | None = None,
        anchor_BM: torch.Tensor | None = None,
        mask_BM: torch.Tensor | None = None,
    ) -> Reduction:
        """New tokens (learned queries, codes, captions) in place of the old ones.

        Args:
            features_BMD: [M, D] or [B, M, D].
            num_in: N.
            matrix_BMN: how sources fed the new tokens, if known, [M, N] or [B, M, N].
            anchor_BM: [B, M] source whose place the target takes (default: -1, none).
            mask_BM: bool [B, M], which targets of a ragged batch exist (default: all).

        Raises:
            ValueError: the shapes do not fit or an anchor is outside -1..N-1.
        """
        if features_BMD.dim() == 2:
            features_BMD = features_BMD[None]
        if features_BMD.dim() != 3:
            raise ValueError(
                f"synthesise: features must be [B, M, D], got {tuple(features_BMD.shape)}."
            )
        batch, num_out = features_BMD.shape[:2]
        if matrix_BMN is not None:
            matrix_BMN = matrix_BMN.unsqueeze(0) if matrix_BMN.dim() == 2 else matrix_BMN
            check_shape(matrix_BMN, (batch, num_out, num_in), "synthesise: matrices")
        mask_BM = as_mask(mask_BM, (batch, num_out), "synthesise")
        if mask_BM is not None:
            features_BMD = features_BMD.masked_fill(~mask_BM[..., None], 0.0)
        if anchor_BM is None:
            anchor_BM = torch.full((batch, num_out), -1, device=features_BMD.device)
        anchor_BM = as_anchors(anchor_BM, (batch, num_out), num_in, mask_BM, "synthesise")
        return cls(
            "synthesise",
            num_in,
            anchor_BM,
            mask_BM,
            matrix_BMN=matrix_BMN,
            features_BMD=features_BMD,
        )

    # -- facts ----------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """B."""
        return self.anchor_BM.shape[0]

    @property
    def num_out(self) -> int:
        """M, the padded number of targets."""
        return self.anchor_BM.shape[1]

    @property
    def counts_B(self) -> torch.Tensor:
        """Existing targets per sample, int64 [B]."""
        if self.mask_BM is None:
            return torch.full((self.batch,), self.num_out, device=self.anchor_BM.device)
        return self.mask_BM.sum(dim=1)

    @property
    def is_identity(self) -> bool:
        """Whether every token is kept, unchanged and in order.

        Waits for an accelerator only when as many tokens come out as went in.
        """
        if self.kind != "select" or self.num_out != self.num_in:
            return False
        order_N = torch.arange(self.num_in, device=self.anchor_BM.device)
        return bool((self.anchor_BM == order_N).all())

    @property
    def groups_BN(self) -> torch.Tensor:
        """Which target holds each source token, int64 [B, N], -1 when it was dropped.

        The first copy of a token that is selected repeatedly; for a transform the target in which
        the source weighs most (absolute weight, lowest index on ties).
        """
        if self.assignment_BN is not None:
            return self.assignment_BN
        if self.kind == "select":
            return first_source(self.anchor_BM, self.num_in)
        if self.matrix_BMN is None:
            return torch.full((self.batch, self.num_in), -1, device=self.anchor_BM.device)
        return strongest(self.matrix_BMN if self.mask_BM is None else self._dense(), dim=1)

    def matrix(self) -> torch.Tensor:
        """The dense matrix W, float [B, M, N].

        Raises:
            ValueError: the tokens were synthesised without a matrix.
        """
        if self.kind in ("transform", "synthesise"):
            return self._dense()
        B, M, N = self.batch, self.num_out, self.num_in
        device = self.anchor_BM.device
        if self.kind == "select":
            column_BM1 = self.anchor_BM.where(self.anchor_BM >= 0, N)[..., None]
            return torch.zeros(B, M, N + 1, device=device).scatter_(2, column_BM1, 1.0)[..., :N]
        assignment_BN, weight_BN = self._merging()
        row_B1N = assignment_BN.where(assignment_BN >= 0, M)[:, None]
        matrix_BMN = torch.zeros(B, M + 1, N, dtype=weight_BN.dtype, device=device)
        return matrix_BMN.scatter(1, row_B1N, weight_BN[:, None])[:, :M]

    # -- actions --------------------------------------------------------------------------------

    def apply(self, x_BN: torch.Tensor) -> torch.Tensor:
        """Reduce anything indexed like the tokens: [B, N, ...] -> [B, M, ...], zero where padded.

        Half-precision input is accumulated in float32 and cast back; a target with a single source
        of weight one equals it exactly. Use `gather` for ids: an average of ids means nothing.
        O(N D) for select and merge on the CPU, O(M N D) for a dense transform.

        Raises:
            ValueError: `x_BN` does not start with [B, N], or the tokens have no provenance.
        """
        self._check_source(x_BN)
        if self.kind == "select":
            return self.gather(x_BN)
        if self.kind == "merge":
            assert self.weight_BN is not None
            return self._sums(x_BN, self.weight_BN)
        if self.matrix_BMN is not None and self.matrix_BMN.is_sparse and x_BN.device.type == "cpu":
            out_BM = matmul(self.matrix_BMN, x_BN)
            return out_BM if self.mask_BM is None else fill_rows(out_BM, ~self.mask_BM, 0.0)
        return matmul(self._dense(), x_BN)

    def gather(self, x_BN: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Read each target's anchor, [B, N, ...] -> [B, M, ...]: for ids, positions and kinds.

        Targets without one (padding, no provenance) hold `fill`. O(M D).
        """
        self._check_source(x_BN)
        out_BM = take_rows(x_BN, self.anchor_BM)
        missing_BM = self.anchor_BM < 0
        if missing_BM.device.type == "cpu" and not missing_BM.any():
            return out_BM
        shape = (*missing_BM.shape, *(1,) * (out_BM.dim() - 2))
        return out_BM.masked_fill_(missing_BM.view(shape), fill)  # what was read is a copy

    def restore(self, y_BM: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Un-merge to full length, [B, M, ...] -> [B, N, ...].

        A merged source copies its target, a selected one its first copy; a dropped source is
        `fill`; for a transform every source takes the average of the targets it fed, weighted by
        the matrix.

        Raises:
            ValueError: `y_BM` does not start with [B, M], or the tokens have no provenance.
        """
        if y_BM.shape[:2] != self.anchor_BM.shape:
            raise ValueError(
                f"restore expects [B, M, ...] = {tuple(self.anchor_BM.shape)} + channels, "
                f"got {tuple(y_BM.shape)}."
            )
        if self.kind in ("select", "merge"):
            group_BN = self.groups_BN
            return fill_rows(take_rows(y_BM, group_BN), group_BN < 0, fill)
        share_BNM = self._dense().transpose(1, 2)
        total_BN = share_BNM.sum(dim=-1)
        share_BNM = share_BNM / total_BN.masked_fill(total_BN == 0, 1.0)[..., None]
        return fill_rows(matmul(share_BNM, y_BM), total_BN == 0, fill)

    def sizes(self, size_BN: torch.Tensor) -> torch.Tensor:
        """How many source tokens every target stands for, [B, N] -> [B, M].

        Merging adds sizes up, selecting keeps them, a transform shares each source's size among its
        targets in proportion to the weights (float32 then; unless `conserve` is False). Only
        dropped tokens lose theirs, and only repeated ones count again. A synthesised token without
        matrix has size 1.
        """
        self._check_source(size_BN)
        if self.kind == "select":
            return self.gather(size_BN)
        if self.kind == "merge":
            total_BM1 = scatter_sum(size_BN[..., None], self.groups_BN, self.num_out)
            return total_BM1[..., 0].to(size_BN.dtype)
        if self.matrix_BMN is None:
            one_BM = torch.ones_like(self.anchor_BM, dtype=size_BN.dtype)
            return one_BM if self.mask_BM is None else one_BM.masked_fill(~self.mask_BM, 0)
        if not size_BN.is_floating_point():
            size_BN = size_BN.float()
        if not self.conserve:
            return self.apply(size_BN)
        return column_shares(self.matrix_BMN if self.mask_BM is None else self._dense(), size_BN)

    def then(self, later: Reduction) -> Reduction:
        """This reduction followed by `later`, as one reduction from the first tokens to the last.

        O(N) for selects and merges, O(M' M N) with a transform. Joining a merge and a select waits
        for an accelerator once, to see whether the select repeats a token.

        Raises:
            ValueError: `later` does not start where this one ends.
        """
        if later.num_in != self.num_out or later.batch != self.batch:
            raise ValueError(
                f"Cannot compose {self.batch} x ({self.num_in} -> {self.num_out}) with "
                f"{later.batch} x ({later.num_in} -> {later.num_out}): counts must meet."
            )
        anchor_BM, mask_BM = self._chained(later)
        if later.kind == "synthesise":
            matrix = later._product(self) if self._has_matrix and later._has_matrix else None
            return replace(later, num_in=self.num_in, anchor_BM=anchor_BM, matrix_BMN=matrix)
        if self.kind == "synthesise":
            assert self.features_BMD is not None
            return Reduction(
                "synthesise",
                self.num_in,
                anchor_BM,
                mask_BM,
                matrix_BMN=later._product(self) if self._has_matrix else None,
                features_BMD=later.apply(self.features_BMD),
            )
        if self.kind == "select" and later.kind == "select":
            distinct = True if self.distinct and later.distinct else None
            return Reduction("select", self.num_in, anchor_BM, mask_BM, distinct=distinct)
        if self._is_merging and later._is_merging:
            first_BN, first_weight_BN = self._merging()
            second_BN, second_weight_BN = later._merging()
            target_BN = take_rows(second_BN, first_BN).masked_fill(first_BN < 0, -1)
            target_BN = drop_hidden(target_BN, mask_BM)
            weight_BN = first_weight_BN * take_rows(second_weight_BN, first_BN)
            weight_BN = weight_BN.masked_fill(target_BN < 0, 0.0)
            return Reduction("merge", self.num_in, anchor_BM, mask_BM, target_BN, weight_BN)
        return later._behind(self, anchor_BM, mask_BM)

    def sample(self, index: int) -> Reduction:
        """One sample of the batch, its padding removed (B = 1).

        Raises:
            ValueError: there is no such sample.
        """
        if not 0 <= index < self.batch:
            raise ValueError(f"There is no sample {index} in a batch of {self.batch}.")
        keep = slice(None) if self.mask_BM is None else self.mask_BM[index]
        row = slice(index, index + 1)
        assignment_BN = None
        if self.assignment_BN is not None:
            assignment_BN = self.assignment_BN[row]
            if self.mask_BM is not None:
                rank_1M = self.mask_BM[row].long().cumsum(1) - 1
                assignment_BN = take_rows(rank_1M, assignment_BN).masked_fill(assignment_BN < 0, -1)
        return Reduction(
            self.kind,
            self.num_in,
            self.anchor_BM[row][:, keep],
            None,
            assignment_BN,
            None if self.weight_BN is None else self.weight_BN[row],
            None if self.matrix_BMN is None else self._dense()[row][:, keep],
            None if self.features_BMD is None else self.features_BMD[row][:, keep],
            self.distinct,
            self.conserve,
        )

    def to(self, device: torch.device | str) -> Reduction:
        """The same reduction with its tensors on `device`."""
        names = ("anchor_BM", "mask_BM", "assignment_BN", "weight_BN", "matrix_BMN", "features_BMD")
        moved = {name: getattr(self, name) for name in names}
        return replace(
            self, **{name: t.to(device) if t is not None else None for name, t in moved.items()}
        )

    # -- helpers --------------------------------------------------------------------------------

    @property
    def _has_matrix(self) -> bool:
        return self.kind != "synthesise" or self.matrix_BMN is not None

    @property
    def _is_merging(self) -> bool:
        """Whether every source feeds at most one target."""
        if self.kind != "select":
            return self.kind == "merge"
        if self.distinct is not None or self.num_out <= 1:
            return self.distinct is not False
        # Repeated -1 is padding, so it is counted in a column of its own that nobody looks at.
        slot_BM = self.anchor_BM.where(self.anchor_BM >= 0, self.num_in)
        times_BN = torch.zeros(self.batch, self.num_in + 1, device=slot_BM.device)
        times_BN.scatter_add_(1, slot_BM, torch.ones_like(slot_BM, dtype=times_BN.dtype))
        distinct = not bool((times_BN[:, : self.num_in] > 1).any())
        object.__setattr__(self, "distinct", distinct)
        return distinct

    def _merging(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Assignment and weights [B, N] of a merge, or of a select that repeats nothing."""
        if self.assignment_BN is not None and self.weight_BN is not None:
            return self.assignment_BN, self.weight_BN
        group_BN = self.groups_BN
        return group_BN, (group_BN >= 0).float()

    def _chained(self, later: Reduction) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Anchors and mask of both steps together; a target anchored in padding is padding."""
        anchor_BM = take_rows(self.anchor_BM, later.anchor_BM).masked_fill(later.anchor_BM < 0, -1)
        mask_BM = later.mask_BM
        if self.mask_BM is None or later.kind == "synthesise":
            return anchor_BM, mask_BM
        exists_BM = take_rows(self.mask_BM, later.anchor_BM) | (later.anchor_BM < 0)
        return anchor_BM, exists_BM if mask_BM is None else exists_BM & mask_BM

    def _behind(
        self, earlier: Reduction, anchor_BM: torch.Tensor, mask_BM: torch.Tensor | None
    ) -> Reduction:
        """`earlier` followed by this one, where only a matrix says what becomes of a token."""
        conserve, matrix_BMN = earlier.conserve and self.conserve, self._product(earlier)
        made = Reduction("transform", earlier.num_in, anchor_BM, mask_BM, conserve=conserve)
        return replace(made, matrix_BMN=matrix_BMN)

    def _product(self, earlier: Reduction) -> torch.Tensor:
        """Matrix of `earlier` followed by this one, dense [B, M, N]."""
        if self.kind in ("select", "merge"):
            return self.apply(earlier.matrix())
        left, right = self._dense(), earlier.matrix()
        dtype = torch.promote_types(left.dtype, right.dtype)
        return left.to(dtype) @ right.to(dtype)

    def _dense(self) -> torch.Tensor:
        if self.matrix_BMN is None:
            raise ValueError(
                "These tokens were synthesised without a matrix: nothing indexed like the source "
                "tokens can be carried over. Pass matrix_BMN to Reduction.synthesise."
            )
        dense = self.matrix_BMN.to_dense() if self.matrix_BMN.is_sparse else self.matrix_BMN
        return dense if self.mask_BM is None else fill_rows(dense, ~self.mask_BM, 0.0)

    def _sums(self, x_BN: torch.Tensor, weight_BN: torch.Tensor) -> torch.Tensor:
        """Weighted sums per target, [B, N, ...] -> [B, M, ...]."""
        assert self.assignment_BN is not None
        shape = (self.batch, self.num_out, *x_BN.shape[2:])
        if 0 in shape:
            return x_BN.new_zeros(shape)
        out = weighted_group_sum(as_channels(x_BN), self.assignment_BN, weight_BN, self.num_out)
        return out.reshape(shape)

    def _check_source(self, x_BN: torch.Tensor) -> None:
        if x_BN.dim() < 2 or x_BN.shape[:2] != (self.batch, self.num_in):
            raise ValueError(
                f"This reduction maps {self.num_in} tokens of {self.batch} sample(s); "
                f"got a tensor of shape {tuple(x_BN.shape)}, expected [{self.batch}, "
                f"{self.num_in}, ...]."
            )
