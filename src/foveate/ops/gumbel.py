"""Choosing with a gradient: hard top-k forward, soft shares backward.

Legend of shape suffixes: N candidates, `...` any leading axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import full_precision, require_shape, widen
from foveate.ops.select import top_k


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent draws of the standard Gumbel distribution, in at least float32.

    Args:
        like: gives the shape, the device and, if that is wider than float32, the dtype.
        generator: source of randomness; its device is where the draw happens. None: torch's own
            on the device of `like`.

    Example:
        >>> noise = gumbel_noise(torch.zeros(9999), torch.Generator().manual_seed(0))
        >>> abs(float(noise.mean()) - 0.5772) < 0.05
        True
    """
    dtype = widen(like[..., :0]).dtype
    where = like.device if generator is None else generator.device
    draw = torch.empty(like.shape, dtype=dtype, device=where).exponential_(generator=generator)
    # An exponential draw of exactly 0 would win against every score.
    return -draw.clamp_min(torch.finfo(dtype).tiny).log().to(like.device)


def gumbel_top_k(
    scores: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw `k` of N candidates without replacement; exactly hard forward, soft backward.

    Forward: 1 at the `k` largest of scores + Gumbel noise, 0 elsewhere. Backward: the gradient of
    softmax((scores + noise) / temperature), which reaches every score, chosen or not. Without noise
    (`noise=torch.zeros(())`) the choice is that of inference, `top_k`. O(N log N).

    Args:
        scores: [..., N], logits of floating point.
        k: number to choose, 0 <= k <= N; at N everything is chosen.
        temperature: of the softmax, above 0.
        generator: source of the noise.
        noise: in place of a draw, what is added, broadcast to [..., N].

    Returns:
        [..., N] in the dtype of `scores`.

    Raises:
        ValueError: `k`, the temperature or a shape is out of range, scores are no floats, or both
            noise and generator are given.

    Example:
        >>> scores = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
        >>> chosen = gumbel_top_k(scores, 1, noise=torch.zeros(()))
        >>> chosen.tolist()
        [0.0, 1.0, 0.0]
        >>> (chosen * torch.tensor([5.0, 1.0, 1.0])).sum().backward()
        >>> scores.grad.ne(0).all().item()
        True

    Source: VideoStreaming (arXiv 2405.16009), memory selection; temperature 1 is ours.
    """
    if not scores.is_floating_point():
        raise ValueError(f"scores must be of floating point, got {scores.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if noise is not None and generator is not None:
        raise ValueError("give either noise or generator, not both")
    with full_precision(scores.device):
        if noise is None:
            noise = gumbel_noise(scores, generator)
        noisy = widen(scores) + noise.to(scores.device)
        require_shape(noisy, tuple(scores.shape), "scores + noise")
        index = top_k(noisy.detach(), k)
        hard = torch.zeros_like(noisy).scatter_(-1, index, 1.0)
        soft = (noisy / temperature).softmax(-1)
        # The difference is exactly 0, so that the forward value stays exactly 0 or 1.
        return (hard + (soft - soft.detach())).to(scores.dtype)


def gumbel_keep(
    logits_NC: Tensor,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw keep or drop for every token by itself; exactly 0 or 1 forward, soft backward.

    Forward: 1 where keeping wins after Gumbel noise. Backward: the gradient of the softmax over
    both, divided by the temperature (straight-through Gumbel-softmax).

    Args:
        logits_NC: [..., 2], of keeping and of dropping.
        temperature: above 0.
        generator: source of randomness; None: torch's own.
        noise: Gumbel noise [..., 2] to take instead; zeros give the more probable choice.

    Returns:
        [...] in the dtype of the logits.

    Raises:
        ValueError: the last axis is not 2, the temperature is not above 0, or both kinds of noise
            are given.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> kept = gumbel_keep(logits, noise=torch.zeros(2, 2))
        >>> kept.tolist()
        [1.0, 0.0]
        >>> kept.sum().backward()
        >>> bool(logits.grad.ne(0).all())
        True

    Source: Jang et al. 2017 (arXiv 1611.01144); as the mask of S5 (arXiv 2303.14526).
    """
    if logits_NC.shape[-1:] != (2,):
        raise ValueError(f"logits must be [..., 2] (keep, drop), got {tuple(logits_NC.shape)}")
    return gumbel_top_k(logits_NC, 1, temperature=temperature, generator=generator, noise=noise)[
        ..., 0
    ]
