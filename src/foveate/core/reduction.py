"""How N tokens became M: one type for selecting, merging, transforming and synthesising tokens.

Legend: B batch, N source tokens, M target tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from foveate.ops.weighted_sum import weighted_group_sum

ReductionKind = Literal["select", "merge", "transform", "synthesise"]


@dataclass(frozen=True, eq=False)
class Reduction:
    """A linear map `Y = W X` from N source tokens to M target tokens, with provenance.

    Build one with `select`, `merge`, `transform`, `synthesise` or `identity`; the constructors
    check shapes. Ragged batches are padded: `mask_BM` is False where a target does not exist,
    `anchor_BM` is -1 there.

    Attributes:
        kind: "select", "merge", "transform" or "synthesise".
        num_in: N.
        anchor_BM: int64 [B, M], the source token whose place (position, id, kind) a target takes;
            -1 for a target without provenance.
        mask_BM: bool [B, M] or None when every target is valid.
        assignment_BN: int64 [B, N], merge only: the target of each source, -1 when dropped.
        weight_BN: float [B, N], merge only: the weight of each source inside its target.
        matrix_BMN: float [B, M, N], transform (or synthesise with provenance) only; may be sparse.
        features_BMD: float [B, M, D], synthesise only.

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
    """

    kind: ReductionKind
    num_in: int
    anchor_BM: torch.Tensor
    mask_BM: torch.Tensor | None = None
    assignment_BN: torch.Tensor | None = None
    weight_BN: torch.Tensor | None = None
    matrix_BMN: torch.Tensor | None = None
    features_BMD: torch.Tensor | None = None

    # -- constructors ---------------------------------------------------------------------------

    @classmethod
    def identity(cls, num: int, batch: int = 1, device: torch.device | str = "cpu") -> Reduction:
        """Keep all `num` tokens of every sample."""
        index_N = torch.arange(num, device=device)
        return cls("select", num, index_N.expand(batch, num))

    @classmethod
    def select(
        cls, index_BM: torch.Tensor, num_in: int, mask_BM: torch.Tensor | None = None
    ) -> Reduction:
        """Keep the source tokens `index_BM`, in that order.

        Args:
            index_BM: int64 [M] or [B, M]; -1 marks padding of a ragged batch.
            num_in: N.
            mask_BM: bool [B, M]; derived from `index_BM >= 0` when the batch is ragged.

        Raises:
            ValueError: an index is outside 0..N-1 or the shape is not [M] or [B, M].
        """
        index_BM = _two_dimensional(index_BM, "index")
        _check_range(index_BM, num_in, "select: index")
        return cls("select", num_in, index_BM, _padding_mask(index_BM, mask_BM))

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
            assignment_BN: int64 [N] or [B, N], the target of each source; -1 drops the source.
            num_out: M.
            weight_BN: [B, N] weight of each source (default: all equal).
            anchor_BM: [B, M] source whose place the target takes (default: its first source).
            mask_BM: bool [B, M], valid targets of a ragged batch.
            normalise: divide the weights by their sum per target; False takes them as they are.

        Raises:
            ValueError: a target index is outside -1..M-1 or the shapes differ.
        """
        assignment_BN = _two_dimensional(assignment_BN, "assignment")
        batch, num_in = assignment_BN.shape
        _check_range(assignment_BN, num_out, "merge: assignment")
        if weight_BN is None:
            weight_BN = torch.ones(batch, num_in, device=assignment_BN.device)
        weight_BN = _two_dimensional(weight_BN, "weight").to(assignment_BN.device)
        if weight_BN.shape != assignment_BN.shape:
            raise ValueError(
                f"merge: weights {tuple(weight_BN.shape)} and assignment "
                f"{tuple(assignment_BN.shape)} must have the same shape [B, N]."
            )
        if not weight_BN.is_floating_point():
            weight_BN = weight_BN.float()
        slot_BN = assignment_BN.where(assignment_BN >= 0, num_out)
        if normalise:
            total_BM = weight_BN.new_zeros(batch, num_out + 1).scatter_add(1, slot_BN, weight_BN)
            total_BN = total_BM.gather(1, slot_BN)
            weight_BN = weight_BN / total_BN.where(total_BN != 0, 1.0)
        if anchor_BM is None:
            order_BN = torch.arange(num_in, device=assignment_BN.device).expand(batch, num_in)
            first_BM = torch.full_like(slot_BN, num_in)[:, :1].expand(batch, num_out + 1)
            first_BM = first_BM.scatter_reduce(1, slot_BN, order_BN, "amin")[:, :num_out]
            anchor_BM = first_BM.where(first_BM < num_in, -1)
        anchor_BM = _two_dimensional(anchor_BM, "anchor")
        if anchor_BM.shape != (batch, num_out):
            raise ValueError(
                f"merge: anchors have shape {tuple(anchor_BM.shape)}, expected {(batch, num_out)}."
            )
        return cls(
            "merge", num_in, anchor_BM, _padding_mask(anchor_BM, mask_BM), assignment_BN, weight_BN
        )

    @classmethod
    def transform(
        cls,
        matrix_BMN: torch.Tensor,
        anchor_BM: torch.Tensor | None = None,
        mask_BM: torch.Tensor | None = None,
    ) -> Reduction:
        """Mix tokens with a general matrix, dense or sparse COO, [M, N] or [B, M, N].

        `anchor_BM` defaults to the source of largest weight (lowest index on ties).
        """
        if matrix_BMN.dim() == 2:
            matrix_BMN = matrix_BMN[None] if not matrix_BMN.is_sparse else matrix_BMN.unsqueeze(0)
        if matrix_BMN.dim() != 3:
            raise ValueError(f"transform: matrix must be [B, M, N], got {tuple(matrix_BMN.shape)}.")
        if anchor_BM is None:
            dense_BMN = matrix_BMN.to_dense() if matrix_BMN.is_sparse else matrix_BMN
            anchor_BM = dense_BMN.argmax(dim=-1)
        anchor_BM = _two_dimensional(anchor_BM, "anchor")
        return cls(
            "transform",
            matrix_BMN.shape[-1],
            anchor_BM,
            _padding_mask(anchor_BM, mask_BM),
            matrix_BMN=matrix_BMN,
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
        """New tokens (learned queries, codes); `matrix_BMN` records how sources fed them, if known.

        Args:
            features_BMD: [M, D] or [B, M, D].
            num_in: N.
        """
        if features_BMD.dim() == 2:
            features_BMD = features_BMD[None]
        if features_BMD.dim() != 3:
            raise ValueError(
                f"synthesise: features must be [B, M, D], got {tuple(features_BMD.shape)}."
            )
        if anchor_BM is None:
            anchor_BM = torch.full(
                features_BMD.shape[:2], -1, dtype=torch.long, device=features_BMD.device
            )
            if mask_BM is None:
                mask_BM = torch.ones_like(anchor_BM, dtype=torch.bool)
        return cls(
            "synthesise",
            num_in,
            _two_dimensional(anchor_BM, "anchor"),
            mask_BM,
            matrix_BMN=matrix_BMN,
            features_BMD=features_BMD,
        )

    # -- facts ----------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.anchor_BM.shape[0]

    @property
    def num_out(self) -> int:
        """M, the padded number of targets."""
        return self.anchor_BM.shape[1]

    @property
    def counts_B(self) -> torch.Tensor:
        """Valid targets per sample, int64 [B]."""
        if self.mask_BM is None:
            return torch.full((self.batch,), self.num_out, device=self.anchor_BM.device)
        return self.mask_BM.sum(dim=1)

    @property
    def is_identity(self) -> bool:
        """Whether every token is kept, unchanged and in order."""
        if self.kind != "select" or self.num_out != self.num_in or self.mask_BM is not None:
            return False
        order_N = torch.arange(self.num_in, device=self.anchor_BM.device)
        return bool((self.anchor_BM == order_N).all())

    @property
    def groups_BN(self) -> torch.Tensor:
        """Which target absorbed each source token, int64 [B, N], -1 when it was dropped."""
        if self.assignment_BN is not None:
            return self.assignment_BN
        if self.kind == "select":
            slots = self.anchor_BM.where(self.anchor_BM >= 0, self.num_in)
            order_M = torch.arange(self.num_out, device=slots.device).expand_as(slots)
            group_BN = torch.full((self.batch, self.num_in + 1), -1, device=slots.device)
            return group_BN.scatter(1, slots, order_M)[:, : self.num_in]
        if self.matrix_BMN is None:
            return torch.full((self.batch, self.num_in), -1, device=self.anchor_BM.device)
        value_BN, target_BN = self._dense().max(dim=1)
        return target_BN.where(value_BN > 0, -1)

    def matrix(self) -> torch.Tensor:
        """The dense matrix W, float [B, M, N].

        Raises:
            ValueError: the tokens were synthesised without a matrix.
        """
        if self.kind in ("transform", "synthesise"):
            return self._dense()
        dtype = torch.float32 if self.weight_BN is None else self.weight_BN.dtype
        eye_NN = torch.eye(self.num_in, dtype=dtype, device=self.anchor_BM.device)
        return self.apply(eye_NN.expand(self.batch, -1, -1))

    # -- actions --------------------------------------------------------------------------------

    def apply(self, x_BN: torch.Tensor) -> torch.Tensor:
        """Reduce anything indexed like the tokens: [B, N, ...] -> [B, M, ...], zero where padded.

        Half-precision input is accumulated in float32 and cast back; a target with a single source
        of weight one is bit-equal to it. O(N) for select and merge, O(M N) for transform.

        Raises:
            ValueError: `x_BN` does not start with [B, N], or the tokens have no provenance.
        """
        self._check_source(x_BN)
        if self.kind == "select":
            return self.gather(x_BN)
        if self.kind == "merge":
            assert self.assignment_BN is not None and self.weight_BN is not None
            flat_BND = x_BN.reshape(*x_BN.shape[:2], -1)
            out_BMD = weighted_group_sum(flat_BND, self.assignment_BN, self.weight_BN, self.num_out)
            return out_BMD.reshape(self.batch, self.num_out, *x_BN.shape[2:])
        return self._matmul(self._dense(), x_BN)

    def gather(self, x_BN: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Read each target's anchor, [B, N, ...] -> [B, M, ...]: for ids, positions and kinds."""
        self._check_source(x_BN)
        index_BM = self.anchor_BM.clamp(min=0)
        trailing = (1,) * (x_BN.dim() - 2)
        index = index_BM.reshape(*index_BM.shape, *trailing).expand(-1, -1, *x_BN.shape[2:])
        out = x_BN.gather(1, index)
        if self.mask_BM is None:
            return out
        known_BM = (self.anchor_BM >= 0) & self.mask_BM
        return out.masked_fill(~known_BM.reshape(*known_BM.shape, *trailing), fill)

    def restore(self, y_BM: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Un-merge to full length, [B, M, ...] -> [B, N, ...].

        A merged source copies its target; a dropped source is `fill`; for a transform every source
        takes the average of the targets it fed, weighted by the matrix.
        """
        if y_BM.shape[:2] != self.anchor_BM.shape:
            raise ValueError(
                f"restore expects [B, M, ...] = {tuple(self.anchor_BM.shape)} + channels, "
                f"got {tuple(y_BM.shape)}."
            )
        trailing = (1,) * (y_BM.dim() - 2)
        if self.kind in ("select", "merge"):
            group_BN = self.groups_BN
            index = group_BN.clamp(min=0).reshape(*group_BN.shape, *trailing)
            out = y_BM.gather(1, index.expand(-1, -1, *y_BM.shape[2:]))
            return out.masked_fill((group_BN < 0).reshape(*group_BN.shape, *trailing), fill)
        share_BNM = self._dense().transpose(1, 2)
        total_BN = share_BNM.sum(dim=-1)
        share_BNM = share_BNM / total_BN.where(total_BN != 0, 1.0)[..., None]
        out = self._matmul(share_BNM, y_BM)
        return out.masked_fill((total_BN == 0).reshape(*total_BN.shape, *trailing), fill)

    def sizes(self, size_BN: torch.Tensor) -> torch.Tensor:
        """How many source tokens every target stands for; merging conserves their sum."""
        if self.kind == "select":
            return self.gather(size_BN)
        if self.kind == "merge":
            assert self.weight_BN is not None
            return replace(self, weight_BN=torch.ones_like(self.weight_BN)).apply(size_BN)
        if self.matrix_BMN is None:
            return torch.ones_like(self.anchor_BM, dtype=size_BN.dtype)
        dense_BMN = self._dense()
        total_BN = dense_BMN.sum(dim=1, keepdim=True)
        return self._matmul(dense_BMN / total_BN.where(total_BN != 0, 1.0), size_BN)

    def then(self, later: Reduction) -> Reduction:
        """This reduction followed by `later`, as one reduction from the first tokens to the last.

        Raises:
            ValueError: `later` does not start where this one ends.
        """
        if later.num_in != self.num_out or later.batch != self.batch:
            raise ValueError(
                f"Cannot compose {self.batch} x ({self.num_in} -> {self.num_out}) with "
                f"{later.batch} x ({later.num_in} -> {later.num_out}): counts must meet."
            )
        anchor_BM = self.anchor_BM.gather(1, later.anchor_BM.clamp(min=0))
        anchor_BM = anchor_BM.where(later.anchor_BM >= 0, -1)
        if later.kind == "synthesise":
            matrix = None
            if later.matrix_BMN is not None and self._has_matrix:
                matrix = later.matrix() @ self.matrix()
            return replace(later, num_in=self.num_in, anchor_BM=anchor_BM, matrix_BMN=matrix)
        if self.kind == "select" and later.kind == "select":
            return Reduction("select", self.num_in, anchor_BM, later.mask_BM)
        if {self.kind, later.kind} <= {"select", "merge"}:
            first, second = self._as_merge(), later._as_merge()
            assert first.assignment_BN is not None and first.weight_BN is not None
            assert second.assignment_BN is not None and second.weight_BN is not None
            middle_BN = first.assignment_BN.clamp(min=0)
            target_BN = second.assignment_BN.gather(1, middle_BN)
            target_BN = target_BN.where(first.assignment_BN >= 0, -1)
            weight_BN = first.weight_BN * second.weight_BN.to(first.weight_BN).gather(1, middle_BN)
            return Reduction("merge", self.num_in, anchor_BM, later.mask_BM, target_BN, weight_BN)
        if self.kind == "synthesise" and self.matrix_BMN is None:
            features_BMD = later.apply(self._features())
            return Reduction(
                "synthesise", self.num_in, anchor_BM, later.mask_BM, features_BMD=features_BMD
            )
        matrix_BMN = later.matrix().to(self.matrix().dtype) @ self.matrix()
        return Reduction("transform", self.num_in, anchor_BM, later.mask_BM, matrix_BMN=matrix_BMN)

    def sample(self, index: int) -> Reduction:
        """One sample of the batch, its padding removed (B = 1)."""
        keep = slice(None) if self.mask_BM is None else self.mask_BM[index]
        row = slice(index, index + 1)
        one = Reduction("select", self.num_in, self.anchor_BM[row][:, keep])
        if self.kind == "select":
            return one
        assignment_BN = None
        if self.assignment_BN is not None:
            assignment_BN = self.assignment_BN[row]
            if self.mask_BM is not None:
                rank_M = self.mask_BM[index].long().cumsum(0) - 1
                target_BN = rank_M[assignment_BN.clamp(min=0)]
                assignment_BN = target_BN.where(assignment_BN >= 0, -1)
        return Reduction(
            self.kind,
            self.num_in,
            one.anchor_BM,
            None if self.kind != "synthesise" else torch.ones_like(one.anchor_BM).bool(),
            assignment_BN,
            None if self.weight_BN is None else self.weight_BN[row],
            None if self.matrix_BMN is None else self._dense()[row][:, keep],
            None if self.features_BMD is None else self.features_BMD[row][:, keep],
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

    def _features(self) -> torch.Tensor:
        assert self.features_BMD is not None
        return self.features_BMD

    def _dense(self) -> torch.Tensor:
        if self.matrix_BMN is None:
            raise ValueError(
                "These tokens were synthesised without a matrix: nothing indexed like the source "
                "tokens can be carried over. Pass matrix_BMN to Reduction.synthesise."
            )
        return self.matrix_BMN.to_dense() if self.matrix_BMN.is_sparse else self.matrix_BMN

    def _matmul(self, matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, matrix.dtype), torch.float32)
        flat = x.reshape(*x.shape[:2], -1).to(dtype)
        out = matrix.to(dtype) @ flat
        return out.to(x.dtype).reshape(out.shape[0], out.shape[1], *x.shape[2:])

    def _check_source(self, x_BN: torch.Tensor) -> None:
        if x_BN.dim() < 2 or x_BN.shape[:2] != (self.batch, self.num_in):
            raise ValueError(
                f"This reduction maps {self.num_in} tokens of {self.batch} sample(s); "
                f"got a tensor of shape {tuple(x_BN.shape)}, expected [{self.batch}, "
                f"{self.num_in}, ...]."
            )

    def _as_merge(self) -> Reduction:
        if self.kind == "merge":
            return self
        group_BN = self.groups_BN
        return replace(
            self, kind="merge", assignment_BN=group_BN, weight_BN=(group_BN >= 0).float()
        )


def _two_dimensional(x: torch.Tensor, what: str) -> torch.Tensor:
    if x.dim() == 1:
        return x[None]
    if x.dim() != 2:
        raise ValueError(f"{what} must be [K] or [B, K], got shape {tuple(x.shape)}.")
    return x


def _check_range(index: torch.Tensor, size: int, what: str) -> None:
    # Reading values back from an accelerator would stall it, so ranges are checked on CPU only.
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= size:
            raise ValueError(f"{what} must lie in 0..{size - 1} (or -1), found {low}..{high}.")


def _padding_mask(index_BM: torch.Tensor, mask_BM: torch.Tensor | None) -> torch.Tensor | None:
    if mask_BM is not None:
        if mask_BM.shape != index_BM.shape:
            raise ValueError(
                f"mask has shape {tuple(mask_BM.shape)}, expected {tuple(index_BM.shape)}."
            )
        return mask_BM.bool()
    # A single sample is never padded, so a -1 in it is a target without provenance.
    if index_BM.device.type == "cpu" and index_BM.shape[0] > 1 and bool((index_BM < 0).any()):
        return index_BM >= 0
    return None
