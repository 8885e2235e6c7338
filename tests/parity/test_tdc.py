"""TDC's scene segmentation against stored numbers of its official code."""

from __future__ import annotations

import torch

from foveate import ops

from .golden_cases import Case, cases


@cases("tdc", "dino", "boundary", "segment_sizes")
def test_scenes(case: Case) -> None:
    x_TNC, max_cuts = case["dino"], case.args["max_num_segments"]
    bounds = ops.scene_segments(x_TNC, max_cuts)
    assert (bounds[:, 1] - bounds[:, 0] + 1).tolist() == case["segment_sizes"].tolist()
    # Of a short video, the official code also names the last frame.
    last = bounds[:, 1].tolist()
    boundary = last if len(x_TNC) <= max_cuts + 1 else last[:-1]
    assert boundary == case["boundary"].tolist()
    found = {cut + 1 for cut in boundary}
    assert len(x_TNC) <= max_cuts + 1 or found == set(case.args["planted_cuts"])
    assert torch.equal(bounds[1:, 0], bounds[:-1, 1] + 1)
