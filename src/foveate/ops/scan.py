"""Linear recurrences: Mamba's selective scan, over gaps in the sequence and along many paths.

Legend of shape suffixes: B batch, E inner channels, S states of a channel, L steps, K kept tokens,
P scan paths, N places of the full sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from foveate.ops._common import full_precision, require_dims, require_shape, widen
from foveate.ops._recurrence import recur, scan_outputs


def linear_recurrence(decay_L: Tensor, input_L: Tensor) -> Tensor:
    """Every state of `h_t = decay_t * h_(t-1) + input_t` from `h = 0`, over the first axis.

    On a CPU a loop over the steps, where a step holds enough for it. Else steps run in chunks of
    about sqrt(L), all chunks side by side, and then the chunks' ends one after the other: 2 sqrt(L)
    dependent operations in place of L for three times the work. The gradient is the same recurrence
    run backwards, so that only the states are kept for it, and has gradients of its own; real or
    complex.

    Args:
        decay_L: [L, ...], magnitude at most 1 for a stable result.
        input_L: [L, ...], of the same shape.

    Raises:
        ValueError: the shapes differ or there is no axis.

    Example:
        >>> linear_recurrence(torch.full((4,), 0.5), torch.tensor([1.0, 0.0, 0.0, 2.0])).tolist()
        [1.0, 0.5, 0.25, 2.125]
    """
    if decay_L.dim() == 0:
        raise ValueError("decay must be [L, ...], got a single number")
    require_shape(input_L, tuple(decay_L.shape), "input")
    kind = torch.promote_types(decay_L.dtype, input_L.dtype)
    # Before the first step there is nothing to decay.
    return recur(decay_L[1:].to(kind), input_L.to(kind))


def selective_scan(
    u_BEL: Tensor,
    delta_BEL: Tensor,
    A_ES: Tensor,
    B_BSL: Tensor,
    C_BSL: Tensor,
    *,
    D_E: Tensor | None = None,
    z_BEL: Tensor | None = None,
    delta_bias_E: Tensor | None = None,
    delta_softplus: bool = True,
    gap_BL: Tensor | None = None,
) -> Tensor:
    """Mamba's scan, `h_t = exp(Delta_t A) h + Delta_t B_t u_t`, `y_t = C_t h_t + D u_t`, gated.

    With gaps it is the scan of a longer sequence of which only some steps are given: before step t
    lie `gap_BL[t]` steps without input, whose raw Delta is 0, so that Delta_0 = softplus(bias).
    They only let the state decay, so all of them fold into one exponent, exp((Delta_t + gap_t
    Delta_0) A): nothing is computed for a step that is not there. O(B E S L), in float32; on a CPU
    without gradients the states of one step are all that is held.

    Args:
        u_BEL: input.
        delta_BEL: raw step sizes.
        A_ES: continuous state matrix, negative.
        B_BSL: input matrix of every step.
        C_BSL: output matrix of every step.
        D_E: skip connection.
        z_BEL: gate; the output is multiplied by silu(z).
        delta_bias_E: added to the raw step sizes.
        delta_softplus: step sizes are softplus(raw + bias).
        gap_BL: int [B, L] empty steps before every one; None: none.

    Returns:
        [B, E, L] in the dtype of `u_BEL`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> one = torch.ones(1, 1, 3)
        >>> selective_scan(one, one, -torch.ones(1, 1), one, one).shape
        torch.Size([1, 1, 3])

    Source: Mamba (arXiv 2312.00752), equation 2; gaps: ToP-ViM (arXiv 2409.18962), the treatment
    of empty steps is ours.
    """
    _check(u_BEL, delta_BEL, A_ES, B_BSL, C_BSL)
    B, _, L = u_BEL.shape
    with full_precision(u_BEL.device):
        delta_BEL, empty_E = widen(delta_BEL), widen(A_ES.new_zeros(A_ES.shape[0]))
        if delta_bias_E is not None:
            delta_BEL = delta_BEL + widen(delta_bias_E)[:, None]
            empty_E = empty_E + widen(delta_bias_E)
        if delta_softplus:
            delta_BEL, empty_E = softplus(delta_BEL), softplus(empty_E)
        u = widen(u_BEL)
        time_BEL = delta_BEL
        if gap_BL is not None:
            require_shape(gap_BL, (B, L), "gap")
            time_BEL = delta_BEL + gap_BL[:, None].to(empty_E) * empty_E[:, None]
        B_LBS, C_LBS = (widen(x).permute(2, 0, 1) for x in (B_BSL, C_BSL))
        time_LBE, input_LBE = (x.permute(2, 0, 1) for x in (time_BEL, delta_BEL * u))
        y_LBE = scan_outputs(time_LBE, input_LBE, widen(A_ES), B_LBS, C_LBS)
        y_BEL = y_LBE.permute(1, 2, 0)
        if D_E is not None:
            y_BEL = y_BEL + u * widen(D_E)[:, None]
        if z_BEL is not None:
            y_BEL = y_BEL * silu(widen(z_BEL))
        return y_BEL.to(u_BEL.dtype)


def path_gaps(rank_PN: Tensor, place_BK: Tensor) -> tuple[Tensor, Tensor]:
    """In which order every scan path meets the kept tokens, and what it steps over before each.

    Args:
        rank_PN: int [P, N], when each path comes to each place of the full sequence.
        place_BK: int [B, K], place of every kept token there, all different.

    Returns:
        order [P, B, K], indices into the K tokens; and the gaps, int [P, B, K]: how many steps
        without a token lie before each of them, in that order.

    Example:
        >>> ranks = torch.stack([torch.arange(5), torch.arange(5).flip(0)])
        >>> order, gaps = path_gaps(ranks, torch.tensor([[0, 1, 4]]))
        >>> order.tolist(), gaps.tolist()
        ([[[0, 1, 2]], [[2, 1, 0]]], [[[0, 0, 2]], [[0, 2, 0]]])
    """
    require_dims(rank_PN, 2, "rank", "[P, N]")
    require_dims(place_BK, 2, "place", "[B, K]")
    came_PBK, order_PBK = rank_PN[:, place_BK].sort(-1)
    before_PBK = pad(came_PBK[..., :-1], (1, 0), value=-1)
    return order_PBK, came_PBK - before_PBK - 1


def serpentine_ranks(rows: int, columns: int) -> Tensor:
    """Four scans of a grid that always step to a neighbour: along rows, along columns, and back.

    Returns:
        int64 [4, rows * columns], when each path comes to each cell of the grid in reading order.

    Example:
        >>> serpentine_ranks(2, 3).tolist()[0]
        [0, 1, 2, 5, 4, 3]

    Source: PlainMamba (arXiv 2403.17695), continuous 2D scanning.
    """
    cell_RC = torch.arange(rows * columns).view(rows, columns)
    by_row, by_column = cell_RC.clone(), cell_RC.T.clone()
    by_row[1::2] = by_row[1::2].flip(1)
    by_column[1::2] = by_column[1::2].flip(1)
    paths = [order.flatten() for order in (by_row, by_column)]
    paths = [paths[0], paths[0].flip(0), paths[1], paths[1].flip(0)]
    return torch.stack([path.argsort() for path in paths])


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    require_dims(u, 3, "u", "[B, E, L]")
    require_dims(A, 2, "A", "[E, S]")
    require_shape(delta, tuple(u.shape), "delta")
    require_shape(A, (u.shape[1], A.shape[1]), "A")
    for name, value in (("B", B), ("C", C)):
        require_shape(value, (u.shape[0], A.shape[1], u.shape[2]), name)
