"""QuickVideo against the official code."""

from __future__ import annotations

from typing import Any

import torch

from foveate.core import Budget, CacheContext
from foveate.methods.quickvideo import QuickVideo, prune_keys
from foveate.video.intervals import keyframe_intervals

from .golden_cases import Case, cases

SCORES = {"vector_norms": "value_norms"}


def settings(case: Case) -> tuple[float, dict[str, Any]]:
    predict = case.args.get("predict", "key_norms_small")
    retain = case.args.get("top_p") or 1.0
    return retain, {"score": SCORES.get(predict, predict), "top_k": case.args.get("top_k")}


@cases("quickvideo", "keys", "values", "keep_idx")
def test_prune_keys(case: Case) -> None:
    retain, options = settings(case)
    past = int(case["past_len"])
    keep, keys, values = prune_keys(case["keys"], case["values"], past, retain=retain, **options)
    assert keep.tolist() == case["keep_idx"].tolist()
    assert keys.equal(case["pruned_keys"])
    assert values.equal(case["pruned_values"])


@cases("quickvideo", "keys", "values", "keep_idx")
def test_cache(case: Case) -> None:
    # The new entries as visual tokens of one group, the past as what the method is not shown.
    retain, options = settings(case)
    past = int(case["past_len"])
    keys, values = case["keys"][:, :, past:], case["values"][:, :, past:]
    N = keys.shape[2]
    context = CacheContext(
        Budget(retain=retain), position_N3=torch.zeros(N, 3), item_N=torch.zeros(N).long()
    )
    reduction = QuickVideo(**options).cache(keys, values, context)
    assert reduction is not None
    assert reduction.anchor_BM[0].tolist() == case["keep_idx"].tolist()


@cases("quickvideo", "keyframe_pts", "intervals")
def test_intervals(case: Case) -> None:
    found = keyframe_intervals(
        case["keyframe_pts"].tolist(),
        int(case["end_pts"]),
        int(case["num_frames"]),
        case["wanted"].tolist(),
        case.args["num_intervals"],
    )
    assert [list(interval) for interval in found] == case["intervals"].tolist()
