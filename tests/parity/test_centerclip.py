"""CenterCLIP against the official clustering.

Legend: R segments, f frames of one, n patches of a segment, K clusters.
"""

from __future__ import annotations

import torch

from foveate import ops
from foveate.attach.encoder_joining import joined_tokens
from foveate.core import Budget, EncoderContext, Tokens
from foveate.methods.centerclip import CenterCLIP

from .golden_cases import Case, cases


def _tokens(case: Case) -> tuple[Tokens, int]:
    """Frames of a segment side by side, [CLS] tokens in front, as they enter a block."""
    frames = case.args["frames_in"] // case.args["segments"]
    return joined_tokens(Tokens(case["x"].transpose(0, 1)), frames, 1), frames


@cases("centerclip", "x", "init_medoids", "out")
def test_start(case: Case) -> None:
    tokens, frames = _tokens(case)
    metric = case.args["distance"]
    first = ops.k_centre(tokens.x_BND[:, frames:], case.args["K"], first="norm", metric=metric)
    assert first.tolist() == case["init_medoids"].flatten(0, 1).tolist()


@cases("centerclip", "x", "medoids", "out")
def test_encoder(case: Case) -> None:
    args = case.args
    tokens, frames = _tokens(case)
    method = CenterCLIP(
        after=1,
        segments=args["segments"],
        clusters=args["K"],
        metric=args["distance"],
        aggregate=args["aggregation"] or "medoid",
        normalise=args["pre_norm"],
        iterations=args["iter_limit"],
    )
    patches = case["x"].shape[0] - 1
    budget = Budget(retain=0.5)
    state = {"prefix": 1, "frames": args["frames_in"]}
    state["plan"] = method.plan(args["frames_in"], patches, budget)
    context = EncoderContext(budget, state=state, layer=1, num_layers=2, num_prefix=frames)
    reduction = method.encoder(tokens, context)
    assert reduction is not None
    medoids = case["medoids"].flatten(0, 1)
    assert (reduction.anchor_BM[:, 1:] - frames).tolist() == medoids.tolist()
    assert (reduction.groups_BN[:, frames:] - 1).tolist() == case["assign"].flatten(0, 1).tolist()
    out = tokens.reduce(reduction).x_BND
    torch.testing.assert_close(out, case["out"].transpose(0, 1), atol=1e-6, rtol=1e-5)
    # A distance of exponent 2 written as a number comes from another formula.
    if args["distance"] == "euclidean":
        again = ops.k_medoids(tokens.x_BND[:, frames:], args["K"], metric=args["norm_p"])[0]
        assert again.tolist() == medoids.tolist()


@cases("centerclip", "x", "planted", "assign")
def test_spectral(case: Case) -> None:
    found = ops.spectral_medoids(case["x"], case.args["K"], sigma=case.args["sigma"])[1]
    for theirs in (case["assign"], case["planted"]):
        same = theirs[:, :, None] == theirs[:, None]
        assert torch.equal(found[:, :, None] == found[:, None], same)
