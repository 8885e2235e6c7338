"""Frames of a video as one row of an encoder's blocks, so that later blocks attend across them.

Legend: I images of the call, f of them in a row, R rows, N tokens of an image, M tokens present in
one, P prefix tokens in front of a row's patches, D channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate.attach.encoder_run import EncoderRun
from foveate.core import (
    EncoderAttentionView,
    EncoderContext,
    Method,
    Reduction,
    Tokens,
    join_rows,
    split_rows,
)
from foveate.core.method import overrides


def joins(method: Method) -> bool:
    """Whether a method may join frames."""
    return overrides(method, "encoder_joins")


def joined_tokens(tokens: Tokens, num: int, front: int) -> Tokens:
    """`num` consecutive rows as one: prefix tokens of all in front, then their patches.

    Args:
        tokens: present tokens, with the reduction that led to them.
        num: rows that become one.
        front: prefix tokens of every row.
    """
    R, M, device = tokens.batch // num, tokens.num_tokens, tokens.device
    place_fM = torch.arange(num * M, device=device).view(num, M)
    order_M = torch.cat([place_fM[:, :front].flatten(), place_fM[:, front:].flatten()])
    so_far = tokens.reduction
    if so_far is None:
        so_far = Reduction.identity(M, tokens.batch, device)

    def beside(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.reshape(R, num * M, *x.shape[2:])

    x_RMD = beside(tokens.x_BND)
    assert x_RMD is not None
    rows = Tokens(
        x_RMD,
        mask_BN=beside(tokens.mask_BN),
        size_BN=beside(tokens.size_BN),
        reduction=join_rows(so_far, num),
    )
    order = Reduction("select", num * M, order_M.expand(R, -1), distinct=True)
    return rows.reduce(order)


def join_frames(run: EncoderRun, method: Method, context: EncoderContext, tokens: Tokens) -> Tokens:
    """The rows that a block runs on from here on, as a method says; the same tokens if it does not.

    Raises:
        ValueError: the rows do not divide by what the method says.
    """
    num = method.encoder_joins(tokens, context)
    if num == 1:
        return tokens
    if num < 1 or tokens.batch % num:
        raise ValueError(
            f"{method.name} joins {num} rows of frames into one, and there are {tokens.batch}: "
            "the frames of a video must divide by it."
        )
    run.tokens = joined_tokens(tokens, num, run.front)
    run.reduction = run.tokens.reduction
    run.joined *= num
    run.front *= num
    return run.tokens


def note_front(run: EncoderRun) -> None:
    """Count the prefix tokens that a reduction of joined rows has left in front."""
    if run.joined == 1 or run.reduction is None:
        return
    anchor_M = run.reduction.anchor_BM[0]
    is_prefix_M = (anchor_M >= 0) & (anchor_M % run.num_tokens < run.num_prefix)
    run.front = int(is_prefix_M.long().cumprod(0).sum())


def view_of_images(view: EncoderAttentionView, num: int) -> EncoderAttentionView:
    """The attention of rows that hold `num` images each, as each of them has it.

    Every image gets the queries and keys of its row, its own prefix tokens in front: patches of
    other frames and their prefix tokens take part in what it sees, so its maps are a share of the
    row's. O(I H M d) memory.
    """
    if num == 1 or view.reduction is None:
        return view
    mine = split_rows(view.reduction, num)
    I, M = mine.batch, mine.num_out  # noqa: E741 - images
    own_IP = mine.groups_BN[:, : view.num_prefix].clamp_min(0)
    later_IM = torch.ones(I, M, dtype=torch.uint8, device=own_IP.device)
    order_IM = later_IM.scatter_(1, own_IP, 0).argsort(dim=1, stable=True)

    def placed(x_RM: torch.Tensor | None) -> torch.Tensor | None:
        if x_RM is None:
            return None
        x_IM = x_RM.repeat_interleave(num, dim=0)
        index_IM = order_IM.view(I, M, *[1] * (x_IM.dim() - 2))
        return x_IM.gather(1, index_IM.expand_as(x_IM))

    def heads(x_RHMd: torch.Tensor | None) -> torch.Tensor | None:
        x_IMHd = placed(None if x_RHMd is None else x_RHMd.transpose(1, 2))
        return None if x_IMHd is None else x_IMHd.transpose(1, 2)

    q_IHMd, k_IHMd = heads(view.q_IHMd), heads(view.k_IHMd)
    assert q_IHMd is not None and k_IHMd is not None
    return replace(
        view,
        q_IHMd=q_IHMd,
        k_IHMd=k_IHMd,
        v_IHMd=heads(view.v_IHMd),
        size_IM=placed(view.size_IM),
        reduction=mine.then(Reduction("select", M, order_IM, distinct=True)),
    )
