"""The most attention that any query pays to a key.

Legend of shape suffixes: B batch, H query heads, G key heads (G divides H), N queries, M keys,
R rows of a group of heads that share keys, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import require_dims, require_shape
from foveate.ops.attention import attention_rows

# Most entries of the attention matrix that are stored at once.
_ENTRIES = 2**26


def peak_attention(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Largest softmax attention that every key gets, over all heads and queries.

    O(B H N M D); at most a fixed part of the attention matrix exists at a time, and keys are not
    repeated for the heads that share them. Gradients flow (and then all of it is stored).

    Args:
        q_BHND: queries [B, H, N, D].
        k_BGMD: keys [B, G, M, D]; G must divide H.
        scale: factor on the logits, default `D ** -0.5`.
        key_mask: [B, M] bool, True where the key may be attended; others get 0.
        query_mask: [B, N] bool, True where the query counts.

    Returns:
        [B, M] in [0, 1], float32 (float64 for float64 input).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> q, k = torch.tensor([[[[9.0, 0.0]]]]), torch.tensor([[[[9.0, 0.0], [0.0, 9.0]]]])
        >>> peak_attention(q, k).round().tolist()
        [[1.0, 0.0]]

    Source: relevance of a token in QTSplus (arXiv 2511.11910).
    """
    require_dims(q_BHND, 4, "q", "[B, H, N, D]")
    require_dims(k_BGMD, 4, "k", "[B, G, M, D]")
    B, H, N, _ = q_BHND.shape
    G, M = k_BGMD.shape[1:3]
    if G == 0 or H % G:
        raise ValueError(f"the {G} key heads must divide the {H} query heads")
    if query_mask is not None:
        require_shape(query_mask, (B, N), "query_mask")
        query_mask = query_mask[:, None].expand(B, H // G, N).flatten(1)[:, None, :, None]
    q_BGRD = q_BHND.unflatten(1, (G, H // G)).flatten(2, 3)
    step = max(1, _ENTRIES // max(1, B * G * M))
    peaks = []
    for start in range(0, q_BGRD.shape[2], step):
        rows = slice(start, start + step)
        rows_BGrM = attention_rows(q_BGRD[:, :, rows], k_BGMD, scale=scale, key_mask=key_mask)
        if query_mask is not None:
            rows_BGrM = rows_BGrM.masked_fill(~query_mask[:, :, rows], 0.0)
        peaks.append(rows_BGrM.amax(dim=(1, 2)))
    if not peaks:
        return attention_rows(q_BGRD, k_BGMD).new_zeros(B, M)
    return torch.stack(peaks).amax(0)
