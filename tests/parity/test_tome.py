"""ToMe against the official code."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, EncoderContext, Tokens
from foveate.methods.tome import ToMe

from .golden_cases import Case, cases, read

SCHEDULES = read("tome")[1].get("parse_r", [])


@cases("tome", "metric", "x", "x_merged")
def test_encoder(case: Case) -> None:
    metric_BNC, x_BND = case["metric"], case["x"]
    prefix = int(case.args.get("class_token", False)) + int(case.args.get("distill_token", False))
    size_BN = case["size"][..., 0] if "size" in case else None
    tokens = Tokens(x_BND, size_BN=size_BN)
    context = EncoderContext(
        Budget(retain=0.5), num_layers=3, num_prefix=prefix, keys_BHNd=metric_BNC[:, None]
    )
    reduction = ToMe(r=case.args["r"]).encoder(tokens, context)
    assert reduction is not None
    if "r_effective" in case.args:
        assert reduction.num_in - reduction.num_out == case.args["r_effective"]
    out = tokens.reduce(reduction)
    torch.testing.assert_close(out.x_BND, case["x_merged"], atol=1e-5, rtol=1e-5)
    assert out.size_BN is not None
    torch.testing.assert_close(out.size_BN, case["size_merged"][..., 0], atol=1e-5, rtol=1e-5)
    if "source" in case:
        slot_M1 = torch.arange(reduction.num_out)[:, None]
        source_BMN = (reduction.groups_BN[:, None] == slot_M1).float()
        assert source_BMN.equal(case["source"])
    if "x_unmerged" in case:
        restored_BND = reduction.restore(out.x_BND)
        torch.testing.assert_close(restored_BND, case["x_unmerged"], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not SCHEDULES, reason="no stored schedules")
def test_schedules() -> None:
    for entry in SCHEDULES:
        r = entry["r"] if isinstance(entry["r"], int) else tuple(entry["r"])
        found = ToMe(r=r).schedule(196, entry["num_layers"], Budget(retain=0.5))
        assert list(found) == entry["out"], entry
