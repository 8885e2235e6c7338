"""The gate with which QTSplus is trained: a threshold for a soft count, hard samples, costs.

Legend: B samples, M visual tokens (padded).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate import ops

Solver = Literal["implicit", "newton", "bisection"]


def solve_threshold(
    relevance_BM: Tensor,
    count_B: Tensor,
    tau: float,
    mask_BM: Tensor | None = None,
    solver: Solver = "implicit",
    iterations: int | None = None,
) -> Tensor:
    """The threshold t at which sum sigmoid((r - t) / tau) is `count`, [B].

    O(iterations B M).

    Args:
        relevance_BM: r.
        count_B: between 0 and the tokens of the sample, both exclusive.
        tau: temperature.
        mask_BM: tokens that count; None: all.
        solver: "implicit": bisection, with the exact gradient in r and count. "newton": from the
            median, differentiable throughout, as released; it may run away where tau is small
            beside the spread of relevance. "bisection" on [min r - 6 tau, max r + 6 tau], without
            a gradient.
        iterations: steps; None: 40 of bisection, 10 of Newton's.

    Raises:
        ValueError: the solver is unknown.

    Example:
        >>> r = torch.tensor([[0.1, 0.2, 0.9]])
        >>> t = solve_threshold(r, torch.tensor([1.0]), 0.1)
        >>> round(float(torch.sigmoid((r - t[:, None]) / 0.1).sum()), 4)
        1.0

    Source: QTSplus (arXiv 2511.11910), training gate; "implicit" is ours.
    """
    if solver not in ("implicit", "newton", "bisection"):
        raise ValueError(f'solver must be "implicit", "newton" or "bisection", got {solver!r}.')
    valid_BM = torch.ones_like(relevance_BM, dtype=torch.bool) if mask_BM is None else mask_BM

    def newton(t_B: Tensor) -> Tensor:
        open_BM = torch.sigmoid((relevance_BM - t_B[:, None]) / tau) * valid_BM
        slope_B = (open_BM * (1 - open_BM)).sum(1) / tau
        return t_B + (open_BM.sum(1) - count_B) / (slope_B + 1e-6)

    if solver == "newton":
        t_B = relevance_BM.masked_fill(~valid_BM, torch.nan).nanmedian(1).values
        for _ in range(iterations or 10):
            t_B = newton(t_B)
        return t_B
    with torch.no_grad():
        low_B = relevance_BM.masked_fill(~valid_BM, torch.inf).amin(1) - 6 * tau
        high_B = relevance_BM.masked_fill(~valid_BM, -torch.inf).amax(1) + 6 * tau
        for _ in range(iterations or 40):
            t_B = (low_B + high_B) / 2
            open_BM = torch.sigmoid((relevance_BM - t_B[:, None]) / tau) * valid_BM
            is_low_B = open_BM.sum(1) > count_B
            low_B, high_B = t_B.where(is_low_B, low_B), high_B.where(is_low_B, t_B)
        t_B = (low_B + high_B) / 2
    if solver == "bisection":
        return t_B
    # At the root, a step of Newton's has the gradient of the root itself; its value is not taken,
    # since between two clusters of relevance, where the slope is 0, it would be anywhere.
    step_B = newton(t_B)
    return t_B + (step_B - step_B.detach())


def sample_gate(
    relevance_BM: Tensor,
    threshold_B: Tensor,
    tau: float,
    mask_BM: Tensor | None = None,
    generator: torch.Generator | None = None,
    released: bool = False,
) -> Tensor:
    """Keep every token with probability sigmoid((r - t) / tau): 1 or 0, straight-through, [B, M].

    Forward exactly 0 or 1, backward the gradient of the relaxed sample. Where a sample would keep
    nothing, its most relevant token stays. O(B M).

    Args:
        relevance_BM: r.
        threshold_B: t.
        tau: temperature.
        mask_BM: tokens there are; None: all.
        generator: source of the Gumbel noise.
        released: noise on the logits r - t at the temperature tau. As the temperature changes no
            argmax, this keeps with probability sigmoid(r - t): far more than was asked for.

    Source: QTSplus (arXiv 2511.11910), training gate; logits (r - t) / tau are ours.
    """
    logit_BM, temperature = relevance_BM - threshold_B[:, None], tau
    if not released:
        logit_BM, temperature = logit_BM / tau, 1.0
    noise_2BM = ops.gumbel_noise(torch.stack([logit_BM, logit_BM]).detach(), generator)
    soft_BM = torch.sigmoid((logit_BM + noise_2BM[0] - noise_2BM[1]) / temperature)
    hard_BM = (soft_BM > 0.5).to(soft_BM.dtype)
    shown_BM = relevance_BM.detach()
    if mask_BM is not None:
        hard_BM, soft_BM = hard_BM * mask_BM, soft_BM * mask_BM
        shown_BM = shown_BM.masked_fill(~mask_BM, -torch.inf)
    best_BM = torch.zeros_like(hard_BM).scatter(1, shown_BM.argmax(1, keepdim=True), 1.0)
    hard_BM = torch.where(hard_BM.any(1, keepdim=True), hard_BM, best_BM)
    return hard_BM + (soft_BM - soft_BM.detach())


def budget_losses(
    rho_B: Tensor, num_B: Tensor, most: int, mean_rho: Tensor | float | None = None
) -> dict[str, Tensor]:
    """What the training of the budget head minimises beside the language model's loss.

    Args:
        rho_B: fractions kept.
        num_B: tokens there were.
        most: n_max, the unit of cost.
        mean_rho: running mean of rho, of earlier steps; None leaves that term out.

    Returns:
        "flops": mean of (rho M / n_max)^2; "kv": mean of rho M / n_max; "smooth": mean of
        (rho - mean_rho)^2. Published weights are 1.0, 1.7 and 0.05, or 0.1, 0.17 and 0.05.

    Source: QTSplus (arXiv 2511.11910), training objective.
    """
    cost_B = rho_B * num_B / most
    losses = {"flops": cost_B.square().mean(), "kv": cost_B.mean()}
    if mean_rho is not None:
        losses["smooth"] = (rho_B - mean_rho).square().mean()
    return losses
