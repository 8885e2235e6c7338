"""Token importance by power iteration over attention (page rank).

Legend of shape suffixes: B batch, H query heads, G key heads, N tokens, D channels of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.ops._common import full_precision, require_dims, require_shape, widen
from foveate.ops.attention import attention_column_sums, expand_keys, masked_softmax

Start = Literal["valid", "all"]

# Bytes of transition matrix that may exist at once before page_rank_qk streams it instead.
_MATRIX_BYTES = 2**28


def page_rank(
    logits_BHNN: Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
    valid: Tensor | None = None,
    start: Start = "valid",
) -> Tensor:
    """Rank tokens by repeated steps of a random walk along sharpened attention.

    Per head `M = softmax(logits / temperature)`, then `p <- (1 - damping) p M + damping p0`
    `iterations` times; the importance is the root mean square of `p` over heads.

    Args:
        logits_BHNN: scaled attention logits [B, H, N, N], masks already added (-inf or minimum).
        temperature: divides the logits; smaller is sharper.
        iterations: number of steps.
        damping: share of mass that restarts at every step, in [0, 1].
        valid: [B, N] bool; tokens that are False are masked as keys.
        start: "valid" spreads the first mass over the valid tokens, so the result equals that of
            the shortened sequence; "all" gives every row 1 / N (the masked form of AIM's code).

    Returns:
        [B, N] float32 importance. Rows that see no key pass nothing on.

    Raises:
        ValueError: shapes do not fit or a parameter is out of range.

    Example:
        >>> importance = page_rank(torch.zeros(1, 2, 4, 4))
        >>> importance.allclose(torch.full((1, 4), 0.25))
        True

    Source: AIM, section 3.3 (arXiv 2412.03248); the damped walk is PageRank.
    """
    require_dims(logits_BHNN, 4, "logits", "[B, H, N, N]")
    B, H, N, _ = logits_BHNN.shape
    require_shape(logits_BHNN, (B, H, N, N), "logits")
    _check(temperature, iterations, damping, start)
    with full_precision(logits_BHNN.device):
        walk_BHNN = widen(logits_BHNN) / temperature
        if valid is not None:
            require_shape(valid, (B, N), "valid")
            walk_BHNN = walk_BHNN.masked_fill(~valid[:, None, None], -torch.inf)
        walk_BHNN = masked_softmax(walk_BHNN)
        start_B1N = _start_mass(walk_BHNN, valid, start)[:, None]
        mass_BHN = start_B1N.expand(B, H, N)
        for _ in range(iterations):
            step_BHN = (mass_BHN.unsqueeze(-2) @ walk_BHNN).squeeze(-2)
            mass_BHN = step_BHN * (1 - damping) + start_B1N * damping
        return mass_BHN.square().mean(1).sqrt()


def page_rank_qk(
    q_BHND: Tensor,
    k_BGND: Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
    causal: bool = True,
    visible_NN: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    start: Start = "valid",
    stream: bool | None = None,
) -> Tensor:
    """Compute `page_rank` from queries and keys, without the logits of all heads at once.

    A step of the walk is a column sum whose row weights are the current mass. Short sequences
    build the matrix of a few heads, walk, and free it (one softmax, O(H N^2 D + H N^2 iterations));
    long ones stream tiles of rows and recompute them at every step (O(N) memory, `iterations` times
    the work).

    Args:
        q_BHND: queries [B, H, N, D].
        k_BGND: keys [B, G, N, D]; G must divide H.
        temperature, iterations, damping, valid, start: as in `page_rank`.
        causal: row i sees keys 0 .. i.
        visible_NN: bool [N, N], which row sees which key, instead of the causal order.
        scale: factor on the logits, default `D ** -0.5`.
        stream: force the streaming form (True) or the matrix form (False); None streams when one
            head's matrix over the batch exceeds 256 MiB.

    Returns:
        [B, N] float32 importance, without gradient.

    Raises:
        ValueError: shapes do not fit or a parameter is out of range.

    Example:
        >>> q, k = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8)
        >>> one, two = page_rank_qk(q, k, stream=True), page_rank_qk(q, k, stream=False)
        >>> one.allclose(two, atol=1e-5)
        True

    Source: AIM, section 3.3 (arXiv 2412.03248).
    """
    k_BHND = expand_keys(q_BHND, k_BGND)
    B, H, N, D = q_BHND.shape
    require_shape(k_BHND, (B, H, N, D), "k (repeated to the query heads)")
    if valid is not None:
        require_shape(valid, (B, N), "valid")
    if visible_NN is not None:
        require_shape(visible_NN, (N, N), "visible")
    _check(temperature, iterations, damping, start)
    factor = D**-0.5 if scale is None else scale
    element = widen(q_BHND[:1, :1, :1, :1]).element_size()
    head_bytes = max(1, B * N * N * element)
    if stream is None:
        stream = head_bytes > _MATRIX_BYTES
    walk = {"temperature": temperature, "iterations": iterations, "damping": damping}
    with torch.no_grad(), full_precision(q_BHND.device):
        if stream:
            return _streamed(q_BHND, k_BHND, factor, causal, visible_NN, valid, start, walk)
        heads = max(1, min(H, _MATRIX_BYTES // head_bytes))
        hidden = None
        if visible_NN is not None:
            hidden = ~visible_NN
        elif causal:
            hidden = torch.ones(N, N, dtype=torch.bool, device=q_BHND.device).triu_(1)
        total_BN: Tensor | float = 0.0
        for h in range(0, H, heads):
            q, k = widen(q_BHND[:, h : h + heads]), widen(k_BHND[:, h : h + heads])
            logits = (q * factor) @ k.transpose(-1, -2)
            if hidden is not None:
                logits.masked_fill_(hidden, -torch.inf)
            rms_BN = page_rank(logits, valid=valid, start=start, **walk)
            total_BN = total_BN + rms_BN.square() * q.shape[1]
        return (total_BN / H).sqrt() if isinstance(total_BN, Tensor) else q_BHND.new_zeros(B, N)


def _streamed(
    q_BHND: Tensor,
    k_BHND: Tensor,
    scale: float,
    causal: bool,
    visible_NN: Tensor | None,
    valid: Tensor | None,
    start: Start,
    walk: dict,
) -> Tensor:
    start_B1N = _start_mass(widen(q_BHND), valid, start)[:, None]
    mass_BHN = start_B1N.expand(q_BHND.shape[:3])
    for _ in range(walk["iterations"]):
        step_BHN = attention_column_sums(
            q_BHND,
            k_BHND,
            row_weights=mass_BHN,
            scale=scale / walk["temperature"],
            causal=causal and visible_NN is None,
            key_mask=valid,
            attn_mask=visible_NN,
            reduce="none",
        )
        mass_BHN = step_BHN * (1 - walk["damping"]) + start_B1N * walk["damping"]
    return mass_BHN.square().mean(1).sqrt()


def _start_mass(like_BHNx: Tensor, valid: Tensor | None, start: Start) -> Tensor:
    B, N = like_BHNx.shape[0], like_BHNx.shape[2]
    if valid is None or start == "all":
        return like_BHNx.new_full((B, N), 1.0 / max(N, 1))
    return valid.to(like_BHNx.dtype) / valid.sum(-1, keepdim=True).clamp_min(1)


def _check(temperature: float, iterations: int, damping: float, start: str) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, got {iterations}")
    if not 0.0 <= damping <= 1.0:
        raise ValueError(f"damping must be in [0, 1], got {damping}")
    if start not in ("valid", "all"):
        raise ValueError(f'start must be "valid" or "all", got {start!r}')
