"""Row operations behind `Reduction`: read, fill, find and mix rows of batched tensors.

Legend: B batch, N source tokens, M target tokens, D channels.
"""

from __future__ import annotations

import torch


def drop_hidden(assignment_BN: torch.Tensor, mask_BM: torch.Tensor | None) -> torch.Tensor:
    """Sources of targets that do not exist belong to none."""
    if mask_BM is None:
        return assignment_BN
    return assignment_BN.where(take_rows(mask_BM, assignment_BN) & (assignment_BN >= 0), -1)


def first_source(target_BN: torch.Tensor, num_out: int) -> torch.Tensor:
    """First source of every target, int64 [B, M], -1 for targets without any."""
    batch, num_in = target_BN.shape
    device = target_BN.device
    slot_BN = target_BN.where(target_BN >= 0, num_out)
    order_BN = torch.arange(num_in, device=device).expand(batch, num_in)
    first_BM = torch.full((batch, num_out + 1), num_in, device=device)
    first_BM = first_BM.scatter_reduce(1, slot_BN, order_BN, "amin")[:, :num_out]
    return first_BM.where(first_BM < num_in, -1)


def strongest(matrix_BMN: torch.Tensor, dim: int) -> torch.Tensor:
    """Index of the largest absolute weight along `dim`, the lowest on ties; -1 if all are zero."""
    if matrix_BMN.is_sparse:
        return _strongest_entry(matrix_BMN.coalesce(), dim)
    if matrix_BMN.shape[dim] == 0:
        shape = matrix_BMN.shape[:dim] + matrix_BMN.shape[dim + 1 :]
        return torch.full(shape, -1, device=matrix_BMN.device)
    value, index = matrix_BMN.abs().max(dim=dim)
    return index.where(value > 0, -1)


def _strongest_entry(matrix_BMN: torch.Tensor, dim: int) -> torch.Tensor:
    """`strongest` from the stored entries alone, which lie in the order of their indices."""
    index_3E, weight_E = matrix_BMN.indices(), matrix_BMN.values().abs()
    other = 3 - dim
    length, size = matrix_BMN.shape[dim], matrix_BMN.shape[other]
    row_E = index_3E[0] * size + index_3E[other]
    most = weight_E.new_zeros(matrix_BMN.shape[0] * size)
    most = most.scatter_reduce(0, row_E, weight_E, "amax")
    best_E = (weight_E == most[row_E]) & (weight_E > 0)
    first = torch.full_like(most, length, dtype=torch.long)
    first = first.scatter_reduce(0, row_E[best_E], index_3E[dim][best_E], "amin")
    return first.where(first < length, -1).view(matrix_BMN.shape[0], size)


def column_shares(matrix_BMN: torch.Tensor, size_BN: torch.Tensor) -> torch.Tensor:
    """Each source's size dealt out to its targets in proportion to the weights, [B, M].

    A sparse matrix is never made dense.
    """
    if not matrix_BMN.is_sparse:
        total_BN = matrix_BMN.sum(dim=1, keepdim=True)
        return matmul(matrix_BMN / total_BN.masked_fill(total_BN == 0, 1.0), size_BN)
    B, M, N = matrix_BMN.shape
    matrix_BMN = matrix_BMN.coalesce()
    (sample_E, row_E, column_E), weight_E = matrix_BMN.indices(), matrix_BMN.values()
    source_E = sample_E * N + column_E
    total = weight_E.new_zeros(B * N).scatter_add(0, source_E, weight_E)
    share_E = weight_E / total.masked_fill(total == 0, 1.0)[source_E] * size_BN.flatten()[source_E]
    return share_E.new_zeros(B * M).scatter_add(0, sample_E * M + row_E, share_E).view(B, M)


def as_channels(x_BN: torch.Tensor) -> torch.Tensor:
    """[B, N, ...] as [B, N, D]."""
    return x_BN[..., None] if x_BN.dim() == 2 else x_BN.flatten(2)


def take_rows(x_BN: torch.Tensor, index_BM: torch.Tensor) -> torch.Tensor:
    """Read rows, [B, N, ...] -> [B, M, ...]; what stands for the index -1 is unspecified."""
    batch, num_in = x_BN.shape[:2]
    num_out = index_BM.shape[1]
    if num_in == 0:
        return x_BN.new_zeros(batch, num_out, *x_BN.shape[2:])
    index_BM = index_BM.clamp(min=0)
    if x_BN.dim() == 2:
        return x_BN.gather(1, index_BM)
    # Whole rows are copied at once; a gather over channels is several times slower on the CPU.
    first_B1 = torch.arange(batch, device=index_BM.device)[:, None] * num_in
    flat = x_BN.flatten(0, 1).index_select(0, (index_BM + first_B1).flatten())
    return flat.view(batch, num_out, *x_BN.shape[2:])


def fill_rows(x_BM: torch.Tensor, where_BM: torch.Tensor, fill: float) -> torch.Tensor:
    """`x_BM` with `fill` in the rows that `where_BM` marks."""
    return x_BM.masked_fill(where_BM.reshape(*where_BM.shape, *(1,) * (x_BM.dim() - 2)), fill)


def matmul(matrix_BMN: torch.Tensor, x_BN: torch.Tensor) -> torch.Tensor:
    """Matrix times tokens in at least float32, in the dtype of the tokens."""
    dtype = torch.promote_types(x_BN.dtype, matrix_BMN.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    out_BMD = torch.bmm(matrix_BMN.to(dtype), as_channels(x_BN).to(dtype))
    return out_BMD.to(x_BN.dtype).reshape(*out_BMD.shape[:2], *x_BN.shape[2:])
