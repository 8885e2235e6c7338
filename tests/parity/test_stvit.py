"""STViT-R: what one group makes of image tokens, step by step, as in the released code."""

from __future__ import annotations

import torch

from foveate.methods.stvit import SemanticGroup, blocks_from_tensors

from .golden_cases import cases


@cases("stvit", "x", "pooled", "s1", "s2", "s3", "s4", "recovered")
def test_every_step(case):
    args, side = case.args, (case.args["samples_per_side"],) * 2
    weights = {k: v for k, v in case.tensors.items() if "." in k or k == "global_tokens"}
    blocks, centres_1TC = blocks_from_tensors(weights, args["heads"], args["ln_eps"])
    assert (centres_1TC is not None) == args["use_global"]
    window = (args["window"],) * 2
    group = SemanticGroup(
        **blocks,
        global_tokens=centres_1TC,
        window=window,
        cells=side,
        residual=args["shortcut"],
    )
    with torch.no_grad():
        steps = group.steps(case["x"], tuple(args["grid"]))
        assert torch.equal(group(case["x"], tuple(args["grid"])), steps.recovered_BNC)
    assert torch.equal(steps.pooled_WsC, case["pooled"])
    for name, found in zip(("s1", "s2", "s3", "s4", "recovered"), steps[1:], strict=True):
        torch.testing.assert_close(found, case[name], atol=2e-6, rtol=1e-5)
