"""Which frames enter an encoder of fixed length together, and where their features belong.

Legend: M frames (or other units in time order), N frames of the encoder's window, J subsequences.
"""

from __future__ import annotations

import torch


def interleave(num_frames: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Deal frames out to subsequences that each span the whole video, and how to undo it.

    With J = ceil(M / N), subsequence j holds the frames j, j + J, j + 2 J, ...; one that comes out
    short repeats its last frame. Features of the subsequences, one after the other, are back in
    time order after `features[inverse_M]`, which leaves the repeated ones out. O(M).

    Args:
        num_frames: M, at least 1.
        window: N, at least 1.

    Returns:
        index_JN: int64 [J, N], the frame in every place of every subsequence.
        inverse_M: int64 [M], the place among all J * N that holds each frame.

    Raises:
        ValueError: either number is below 1.

    Example:
        >>> index_JN, inverse_M = interleave(6, 3)
        >>> index_JN.tolist(), inverse_M.tolist()
        ([[0, 2, 4], [1, 3, 5]], [0, 3, 1, 4, 2, 5])
        >>> interleave(3, 2)[0].tolist()
        [[0, 2], [1, 1]]

    Source: Interpolating Video-LLMs, arXiv 2409.12963 (video token rearrangement).
    """
    if num_frames < 1 or window < 1:
        raise ValueError(f"num_frames and window must be at least 1, got {num_frames}, {window}.")
    count = -(-num_frames // window)
    first_J1 = torch.arange(count)[:, None]
    last_J1 = first_J1 + (num_frames - 1 - first_J1) // count * count
    index_JN = (first_J1 + torch.arange(window) * count).minimum(last_J1)
    frame_M = torch.arange(num_frames)
    return index_JN, frame_M % count * window + frame_M // count
