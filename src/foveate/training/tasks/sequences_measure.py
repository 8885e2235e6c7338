"""What S5, random masks and LSMCL reach on held-out videos.

Legend: B videos, L tokens, D channels, C classes, F features, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import foveate
from foveate import ops
from foveate.core import EncoderContext, Reduction, Tokens
from foveate.methods.s5 import S5
from foveate.training.loop import Tell
from foveate.training.task import Outcome, paired_gain
from foveate.training.tasks.sequences import (
    HELD_OUT,
    PROBED,
    RETAIN,
    Sequences,
    drawn_mask,
)
from foveate.training.tasks.sequences_clips import Embedder, finds_own, probe
from foveate.training.tasks.sequences_data import ORDERS, THINGS

#: What is asked: share of planted tokens that stay, distance of the mask's mean from RETAIN, and
#: share of short clips that find their own video.
_PLANTED_KEPT, _RATIO_NEAR, _FOUND = 90.0, 0.03, 50.0
#: Videos in one call, and among how many a short clip has to find its own.
_AT_ONCE, _GALLERY = 32, 256
_ORDER, _PLANTED = "order named right (%)", "planted tokens kept (%)"
_ZERO, _GATHER = f's5(form="zero", retain={RETAIN})', f"s5(retain={RETAIN})"


@dataclass(frozen=True)
class RandomTokens(S5):
    """S5 that keeps tokens at random: what it is compared with."""

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Choose the tokens; tokens [B, L, D]."""
        B, L, _ = tokens.x_BND.shape
        keep = self.count_tokens(L, context.budget)
        index_BK = ops.random_indices(B, L, keep, seed=context.seed, device=tokens.device)
        return Reduction.select(index_BK, L)


@dataclass(frozen=True)
class Found:
    """What one model reaches on the held-out videos.

    Attributes:
        right: [N] 100 where the order was named right, else 0.
        planted: 100 for every planted token that was kept, else 0.
        share: of the untouched FLOPs.
    """

    right: Tensor
    planted: Tensor
    share: float


def measure(
    task: Sequences, modules: dict[str, nn.Module], tell: Tell, stream: int = HELD_OUT
) -> list[Outcome]:
    """The rows of the card, on the videos of a stream of random numbers."""
    recipes: dict[str, tuple[str, S5 | None]] = {
        "untouched": ("s4", None),
        "zero": ("zero", S5(form="zero")),
        "gather": ("gather", S5()),
        "zero, s5": ("s5", S5(form="zero")),
        "gather, s5": ("s5", S5()),
        "random": ("random", RandomTokens(form="zero")),
        "random, s4": ("s4", RandomTokens(form="zero")),
    }
    found: dict[str, Found] = {}
    for number, (name, (model, method)) in enumerate(recipes.items()):
        tell("evaluation", number, len(recipes) + 1, {})
        found[name] = _measured(modules[model], method, task, stream)
    rows = [*_order_rows(found), *_kept_rows(found), _mask_row(modules["s5"], task, stream)]
    tell("evaluation", len(recipes), len(recipes) + 1, {})
    rows += _clip_rows(modules, task, stream)
    tell("evaluation", len(recipes) + 1, len(recipes) + 1, {})
    return rows


def _videos(task: Sequences, stream: int) -> Iterator[dict[str, Tensor]]:
    size = min(task.held_out, _AT_ONCE)
    for step in range(task.held_out // size):
        yield task.videos(stream, step, size)


def _measured(model: nn.Module, method: S5 | None, task: Sequences, stream: int) -> Found:
    right, planted, share = [], [], 1.0
    for batch in _videos(task, stream):
        tokens_BLD = batch["tokens"].to(next(model.parameters()).device)
        kept_BL = torch.ones_like(batch["planted"])
        if method is None:
            logits_BC = model(tokens_BLD)
        else:
            with foveate.reduce(model, method, retain=RETAIN) as run:
                logits_BC = model(tokens_BLD)
                assert run.encoder_reduction is not None
                kept_BL = (run.encoder_reduction.groups_BN >= 0).cpu()
            flops = run.report.flops
            share = flops["reduced"]["total"] / flops["untouched"]["total"]
        right.append(100.0 * (logits_BC.argmax(-1).cpu() == batch["label"]))
        planted.append(100.0 * kept_BL[batch["planted"]])
    return Found(torch.cat(right), torch.cat(planted), share)


def _order_rows(found: dict[str, Found]) -> list[Outcome]:
    """The order; "untouched" reads all tokens."""
    whole_N = found["untouched"].right
    needed = "matches or beats untouched, within two standard errors"
    short = "falls short of untouched by two standard errors"
    share = f"{RETAIN} kept at random"
    rows = [Outcome("untouched", _ORDER, float(whole_N.mean()))]
    for name, recipe, bar in (
        ("zero", _ZERO, needed),
        ("gather", _GATHER, needed),
        ("zero, s5", f"{_ZERO}, behind the stage s5", ""),
        ("gather, s5", f"{_GATHER}, behind the stage s5", ""),
        ("random", f"{share}, trained alike", short),
        ("random, s4", f"{share}, untouched model", ""),
    ):
        one = found[name]
        gain, error = paired_gain(one.right, whole_N)
        met = {needed: gain >= -2 * error, short: gain < -2 * error}.get(bar)
        value = float(one.right.mean())
        rows.append(Outcome(recipe, _ORDER, value, one.share, bar, met, note=_noted(gain, error)))
    return rows


def _kept_rows(found: dict[str, Found]) -> list[Outcome]:
    """Planted tokens that stay; both forms keep the same ones."""
    s5, drawn = found["zero"], found["random"]
    kept, bar = float(s5.planted.mean()), f"at least {_PLANTED_KEPT:.0f} %"
    return [
        Outcome(_ZERO, _PLANTED, kept, s5.share, bar, kept >= _PLANTED_KEPT),
        Outcome(f"{RETAIN} kept at random", _PLANTED, float(drawn.planted.mean())),
    ]


def _mask_row(model: nn.Module, task: Sequences, stream: int) -> Outcome:
    """The share that masks keep as they are drawn in training."""
    device = next(model.parameters()).device
    shares = [
        drawn_mask(model, batch["tokens"].to(device), batch["gumbel"].to(device)).mean()  # pyright: ignore[reportArgumentType]
        for batch in _videos(task, stream)
    ]
    mean = float(torch.stack(shares).mean())
    bar, met = f"within {_RATIO_NEAR} of {RETAIN}", abs(mean - RETAIN) < _RATIO_NEAR
    return Outcome("s5, masks drawn as in training", "mean of the mask", mean, bar=bar, met=met)


# -- LSMCL ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a network makes of videos and of a short clip of each, with all tokens.

    Attributes:
        feature: [N, F] of the whole videos.
        found: [N] 100 where the short clip finds its own video, else 0.
        order: int64 [N], their class.
        thing: int64 [N], what kind of thing they show.
    """

    feature: Tensor
    found: Tensor
    order: Tensor
    thing: Tensor


def _seen(modules: dict[str, nn.Module], name: str, task: Sequences, stream: int) -> Seen:
    """What the network has in `stream`; without pre-training, features are the embeddings."""
    fast, slow = (modules[key] for key in ((name, "slow") if name == "lsmcl" else (name, name)))
    assert isinstance(fast, Embedder) and isinstance(slow, Embedder)
    device = next(fast.parameters()).device
    features, shorts, longs, orders, things = [], [], [], [], []
    size = min(task.held_out, _AT_ONCE)
    for step in range(task.held_out // size):
        batch = task.clips(stream, step, size)
        long_BLD, short_BLD = batch["long"].to(device), batch["short"].to(device)
        features.append(fast.body(long_BLD))
        if name == "lsmcl":
            shorts.append(modules["predictor"](fast(short_BLD)))
            longs.append(slow(long_BLD))
        else:
            shorts.append(fast.body(short_BLD))
            longs.append(features[-1])
        orders.append(batch["label"])
        things.append(batch["thing"])
    pairs = zip(torch.cat(shorts).split(_GALLERY), torch.cat(longs).split(_GALLERY), strict=True)
    found = 100.0 * torch.cat([finds_own(short, long) for short, long in pairs]).cpu()
    return Seen(torch.cat(features), found, torch.cat(orders), torch.cat(things))


def _clip_rows(modules: dict[str, nn.Module], task: Sequences, stream: int) -> list[Outcome]:
    """A linear probe on frozen features, and retrieval, with and without pre-training."""
    names = {"untrained": "no pre-training", "lsmcl": "LSMCL"}
    known = {name: _seen(modules, name, task, PROBED) for name in names}
    asked = {name: _seen(modules, name, task, stream) for name in names}
    right_by: dict[str, dict[str, Tensor]] = {"thing": {}, "order": {}}
    for what, classes in (("thing", THINGS), ("order", len(ORDERS))):
        for name in names:
            label_N = getattr(known[name], what)
            named_N = probe(known[name].feature, label_N, asked[name].feature, classes)
            right_by[what][name] = 100.0 * (named_N == getattr(asked[name], what))
    better = "better than no pre-training by two standard errors"
    most = f"at least {_FOUND:.0f} %, and better than no pre-training by two standard errors"
    rows = []
    for metric, by, bar in (
        ("things named right by a linear probe (%)", right_by["thing"], better),
        ("orders named right by a linear probe (%)", right_by["order"], ""),
        (
            f"short clips that find their own of {min(_GALLERY, task.held_out)} videos (%)",
            {name: one.found for name, one in asked.items()},
            most,
        ),
    ):
        for name, recipe in names.items():
            value = float(by[name].mean())
            if name == "untrained":
                rows.append(Outcome(recipe, metric, value))
                continue
            gain, error = paired_gain(by[name], by["untrained"])
            met = None
            if bar:
                met = gain > 2 * error and (bar != most or value >= _FOUND)
            rows.append(Outcome(recipe, metric, value, bar=bar, met=met, note=_noted(gain, error)))
    return rows


def _noted(gain: float, error: float) -> str:
    return f"{gain:+.2f} points, standard error {error:.2f}"
