"""ToP-ViM against Mamba's official sequential scan, with dropped tokens as steps without input."""

from __future__ import annotations

from typing import Any

import torch

from foveate import ops
from foveate.methods.tovim import scan_importance

from .golden_cases import Case, cases

SCAN = cases("tovim", "y_full", "y_aligned")


def scan(case: Case, index_BK: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """The scan of the case, of all steps or of some."""

    def take(name: str) -> torch.Tensor:
        value = case[name]
        if index_BK is None:
            return value
        return value.gather(2, index_BK[:, None].expand(-1, value.shape[1], -1))

    return ops.selective_scan(
        take("u"),
        take("delta"),
        case["A"],
        take("B"),
        take("C"),
        D_E=case["D"],
        z_BEL=take("z"),
        delta_bias_E=case["delta_bias"],
        **options,
    )


@SCAN
def test_dense_scan(case: Case) -> None:
    torch.testing.assert_close(scan(case), case["y_full"], rtol=1e-4, atol=1e-4)


@SCAN
def test_importance_and_choice(case: Case) -> None:
    score_BL = scan_importance(case["y_full"].transpose(1, 2)[None])
    torch.testing.assert_close(score_BL, case["importance"], rtol=1e-4, atol=1e-4)
    assert torch.equal(ops.top_k(score_BL, case.args["keep"]), case["keep_index"])


@SCAN
def test_kept_steps_know_of_the_gaps(case: Case) -> None:
    index_BK = case["keep_index"]
    forwards_1L = torch.arange(case["u"].shape[2])[None]
    order_PBK, gap_PBK = ops.path_gaps(forwards_1L, index_BK)
    assert torch.equal(order_PBK[0], torch.arange(index_BK.shape[1]).expand_as(index_BK))
    aligned = scan(case, index_BK, gap_BL=gap_PBK[0])
    torch.testing.assert_close(aligned, case["y_aligned"], rtol=1e-4, atol=1e-4)


@SCAN
def test_naive_gather(case: Case) -> None:
    naive = scan(case, case["keep_index"])
    torch.testing.assert_close(naive, case["y_naive"], rtol=1e-4, atol=1e-4)
    assert (naive - case["y_aligned"]).abs().max() > 1e-2
