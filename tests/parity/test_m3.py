"""M3 against the official code."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Grid, ProjectorContext, Tokens
from foveate.methods.m3 import M3

from .golden_cases import Case, cases


def pooled(method: M3, case: Case, tokens: int) -> torch.Tensor:
    """The public method on every image of a case."""
    side = case.args["side"]
    grid, budget = Grid.image(side, side), Budget(tokens=tokens)
    outputs = []
    for x_NC in case["tokens"]:
        reduction = method.projector(
            Tokens.from_grid(x_NC, grid), ProjectorContext(budget, grid=grid)
        )
        outputs.append(x_NC if reduction is None else reduction.apply(x_NC[None])[0])
        assert method.count(grid, budget).tokens == len(outputs[-1])
    return torch.stack(outputs)


@cases("m3", "tokens")
def test_released_rule(case: Case) -> None:
    for scale, expected in case.numbered("out_"):
        out = pooled(M3(rule="released"), case, scale)
        assert out.shape[1] == case.args["counts"][str(scale)]
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@cases("m3", "tokens")
def test_sizes_that_exist_are_the_released_ones(case: Case) -> None:
    method = M3(kernels=(1, 2, 3, 4, 6, 8, 12, 24), strict=True)
    for scale, expected in case.numbered("out_"):
        if case.args["counts"][str(scale)] == scale:
            torch.testing.assert_close(pooled(method, case, scale), expected, atol=1e-6, rtol=0)
        else:
            with pytest.raises(ValueError, match=f"no size of {scale} tokens"):
                pooled(method, case, scale)
