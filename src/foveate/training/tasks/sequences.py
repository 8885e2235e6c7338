"""A ViS4mer that reads the order of planted tokens in noise, and S5 on it.

Legend: B sequences, L tokens, D channels, K tokens kept, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import foveate
from foveate import ops
from foveate.core import EncoderContext, Reduction, Tokens
from foveate.methods._s5_training import random_mask, selective_loss
from foveate.methods.s5 import S5
from foveate.models.backbones import ViS4mer, ViS4merConfig
from foveate.models.backbones.s4d import S4D
from foveate.training.loop import Tell
from foveate.training.sizes import Stage
from foveate.training.task import Outcome, Task, TaskSize, standard_error
from foveate.training.tasks.sequences_data import ORDERS, draw_sequences

#: Share of tokens that the mask generator is trained to keep, and weight of its loss.
RETAIN, RATIO_WEIGHT = 0.25, 2.0
#: Of the copy that the mask generator reads.
MOMENTUM = 0.99
#: Streams of random numbers: the first two stages, those behind them, and held-out sequences.
_FIRST, _SECOND, _THEN, _HELD_OUT = range(4)
#: Share of noise in the stage "quiet", and part of the stage "noisy" in which it rises to 1.
_QUIET, _RISING = 0.01, 0.7
#: Learning rate of classifier and mask generator over that of the rest.
_FASTER, _GENERATOR = 10.0, 10.0
#: Above RETAIN, the share of tokens that the stage "s5" begins with; it falls for half of it.
_MORE = 0.5
#: What is asked: share of planted tokens that stay, and distance of the mask's mean from RETAIN.
_PLANTED_KEPT, _RATIO_NEAR = 90.0, 0.03


class Sequences(Task):
    """Noise tokens with three to five planted ones; the order of their symbols is the class.

    The first two stages train one ViS4mer on all tokens: "quiet" with hardly any noise between
    the planted ones and zeros in its place, "noisy" with more and more. From its weights three go
    on, equally long on the same sequences: "s5" trains decoder and mask generator together,
    "random" reads random masks of the same share, "s4" all tokens.

    Example:
        >>> task = Sequences("tiny")
        >>> task.batch("s5", 0)["tokens"].shape
        torch.Size([4, 64, 16])

    Source: S5, arXiv 2303.14526; data, sizes and what the card calls ours are ours.
    """

    name: ClassVar[str] = "sequences"
    # Transforms and kernels are in float32 anyway.
    autocast = False

    def __init__(self, size: TaskSize = "small", seed: int = 0) -> None:
        super().__init__(size, seed)
        tiny = size == "tiny"
        self.length, self.width = (64, 16) if tiny else (512, 32)
        self.config = ViS4merConfig(
            inputs=self.width,
            hidden=self.width,
            blocks=2,
            state=4 if tiny else 16,
            classes=len(ORDERS),
            # Fresh data in every step, and dropout would draw from a global state.
            dropout=0.0,
            mask_generator=True,
        )
        quiet = Stage(3, 4, 3e-3, 1) if tiny else Stage(240, 16, 1e-2, 40)
        noisy = Stage(3, 4, 3e-3, 1) if tiny else Stage(800, 16, 5e-3, 20)
        then = Stage(3, 4, 3e-3, 1) if tiny else Stage(450, 16, 3e-3, 20)
        self.stages = {"quiet": quiet, "noisy": noisy, "s5": then, "random": then, "s4": then}
        self.held_out = 16 if tiny else 1024

    # -- training ---------------------------------------------------------------------------------

    def build(self) -> dict[str, nn.Module]:
        """The model of the first stages and the three that go on from it."""
        models = {name: ViS4mer(self.config) for name in ("first", "s5", "random", "s4")}
        with torch.no_grad():
            # A symbol is one step of 512, and a kernel is as small as its step size: without this
            # what a model knows of the order begins a thousand times smaller than what it does not.
            for layer in models["first"].s4_layers:
                assert isinstance(layer, S4D)
                layer.kernel.C.mul_(8.0)
            last = models["first"].linears[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(6.0)
        return dict(models)

    def groups(self, stage: str, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, float]]:
        """What a stage trains; the copy that the mask generator reads is never among it."""
        model = _trained(stage, modules)
        trained: list[tuple[nn.Module, float]] = [(model.s4_layers, 1.0), (model.norms, 1.0)]
        trained += [(model.linears, 3.0), (model.decoder, _FASTER)]
        if stage == "s5":
            generator = model.mask_generator
            assert generator is not None
            trained += [(generator.norm, _GENERATOR), (generator.linear, _GENERATOR)]
        return trained

    def begin(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Go on from the weights of the first stages."""
        model = _trained(stage, modules)
        if model is not modules["first"]:
            model.load_state_dict(modules["first"].state_dict())
            model.update_momentum(0.0)

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """Sequences with labels, and the noise that decides masks."""
        part = step / self.stages[stage].steps
        rising = _QUIET ** max(0.0, 1 - part / _RISING)
        noisy = {"quiet": _QUIET, "noisy": rising}.get(stage, 1.0)
        stream = {"quiet": _FIRST, "noisy": _SECOND}.get(stage, _THEN)
        batch = self._drawn(stream, step, self.stages[stage].clips, noisy)
        return batch | {"ratio": torch.tensor(RETAIN + _MORE * max(0.0, 1 - 2 * part))}

    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the order, and with a mask generator the loss of its ratio."""
        model, tokens_BLD = _trained(stage, modules), batch["tokens"]
        mask_BL = None
        if stage == "s5":
            mask_BL = drawn_mask(model, tokens_BLD, batch["gumbel"])
        elif stage == "random":
            mask_BL = random_mask(batch["gumbel"][..., 0], RETAIN)
        logits_BC = model(tokens_BLD, mask_BL)
        loss = cross_entropy(logits_BC, batch["label"])
        right = (logits_BC.argmax(-1) == batch["label"]).float().mean()
        facts = {"accuracy": right}
        if stage == "s5":
            assert mask_BL is not None
            facts |= {"kept": mask_BL.mean(), "planted_kept": mask_BL[batch["planted"]].mean()}
            loss = selective_loss(loss, mask_BL, float(batch["ratio"]), RATIO_WEIGHT)
        return loss, facts

    def after_step(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Move the copy that no gradient reaches."""
        if stage == "s5":
            _trained(stage, modules).update_momentum(MOMENTUM)

    # -- data -------------------------------------------------------------------------------------

    def _drawn(self, stream: int, step: int, count: int, noisy: float = 1.0) -> dict[str, Tensor]:
        draw = np.random.Generator(np.random.PCG64([self.seed, stream, step]))
        drawn = draw_sequences(draw, count, self.length, self.width, noisy)
        batch = {name: torch.from_numpy(value) for name, value in drawn._asdict().items()}
        gumbel = draw.gumbel(size=(count, self.length, 2)).astype(np.float32)
        return batch | {"gumbel": torch.from_numpy(gumbel)}

    def _held_out(self) -> Iterator[dict[str, Tensor]]:
        size = min(self.held_out, 32)
        for step in range(self.held_out // size):
            yield self._drawn(_HELD_OUT, step, size)

    # -- measurement ------------------------------------------------------------------------------

    def measure(self, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
        """Order, planted tokens and mask of S5, beside all tokens and random masks."""
        recipes: dict[str, tuple[str, S5 | None]] = {
            "untouched": ("s4", None),
            "s5": ("s5", S5(form="zero")),
            "gathered": ("s5", S5()),
            "random": ("random", RandomTokens(form="zero")),
            "random, s4": ("s4", RandomTokens(form="zero")),
        }
        found: dict[str, Found] = {}
        for number, (name, (model, method)) in enumerate(recipes.items()):
            tell("evaluation", number, len(recipes), {})
            found[name] = self._measured(modules[model], method)
        rows = [*_rows(found), self._mask(_trained("s5", modules))]
        tell("evaluation", len(recipes), len(recipes), {})
        return rows

    def _measured(self, model: nn.Module, method: S5 | None) -> Found:
        right, planted, share = [], [], 1.0
        for batch in self._held_out():
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

    def _mask(self, model: ViS4mer) -> Outcome:
        """The share that masks keep as they are drawn in training."""
        device = next(model.parameters()).device
        shares = [
            drawn_mask(model, batch["tokens"].to(device), batch["gumbel"].to(device)).mean()
            for batch in self._held_out()
        ]
        mean = float(torch.stack(shares).mean())
        return Outcome(
            "s5, masks drawn as in training",
            "mean of the mask",
            mean,
            bar=f"within {_RATIO_NEAR} of {RETAIN}",
            met=abs(mean - RETAIN) < _RATIO_NEAR,
        )


@dataclass(frozen=True)
class Found:
    """What one model reaches on the held-out sequences.

    Attributes:
        right: [N] 100 where the order was named right, else 0.
        planted: 100 for every planted token that was kept, else 0.
        share: of the untouched FLOPs.
    """

    right: Tensor
    planted: Tensor
    share: float


@dataclass(frozen=True)
class RandomTokens(S5):
    """S5 that keeps tokens at random: what it is compared with."""

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Choose the tokens; tokens [B, L, D]."""
        B, L, _ = tokens.x_BND.shape
        keep = self.count_tokens(L, context.budget)
        index_BK = ops.random_indices(B, L, keep, seed=context.seed, device=tokens.device)
        return Reduction.select(index_BK, L)


def drawn_mask(model: ViS4mer, tokens_BLD: Tensor, gumbel_BL2: Tensor) -> Tensor:
    """The mask generator's mask with this noise, [B, L] of 0 and 1 with gradients."""
    logits_BL2 = model.keep_logits(model.encode(tokens_BLD))
    assert logits_BL2 is not None
    return ops.gumbel_keep(logits_BL2, noise=gumbel_BL2)


def _trained(stage: str, modules: dict[str, nn.Module]) -> ViS4mer:
    """The model that a stage trains."""
    model = modules.get(stage, modules["first"])
    assert isinstance(model, ViS4mer)
    return model


def _rows(found: dict[str, Found]) -> list[Outcome]:
    """The outcomes on held-out sequences; "untouched" reads all tokens."""
    whole, s5, drawn = found["untouched"], found["s5"], found["random"]
    name, share = f"s5(retain={RETAIN})", f"{RETAIN} kept at random"
    zero = f's5(form="zero", retain={RETAIN})'
    needed = "matches or beats untouched, within two standard errors"
    metric = "order named right (%)"
    rows = [
        _row("untouched", metric, whole.right),
        _row(zero, metric, s5.right, s5.share, needed, other_N=whole.right, at_least=True),
        _row(name, metric, found["gathered"].right, found["gathered"].share),
        _row(f"{share}, trained alike", metric, drawn.right, drawn.share),
        _row(f"{share}, untouched model", metric, found["random, s4"].right),
    ]
    gap = float(whole.right.mean()) - float(drawn.right.mean())
    rows[3] = replace(
        rows[3], bar="falls short of untouched", met=gap > 2 * standard_error(whole.right)
    )
    kept = float(s5.planted.mean())
    rows.append(
        Outcome(
            zero,
            "planted tokens kept (%)",
            kept,
            s5.share,
            bar=f"at least {_PLANTED_KEPT:.0f} %",
            met=kept >= _PLANTED_KEPT,
        )
    )
    rows.append(Outcome(share, "planted tokens kept (%)", float(drawn.planted.mean())))
    return rows


def _row(
    recipe: str,
    metric: str,
    value_N: Tensor,
    flops: float | None = None,
    bar: str = "",
    other_N: Tensor | None = None,
    at_least: bool = False,
) -> Outcome:
    """A mean over samples; with a bar, against others: above them, or at least as good."""
    value = float(value_N.mean())
    if other_N is None:
        return Outcome(recipe, metric, value, flops)
    gain_N = value_N - other_N
    gain, error = float(gain_N.mean()), standard_error(gain_N)
    met = gain > -2 * error if at_least else gain > 2 * error
    note = f"{gain:+.2f} points, standard error {error:.2f}"
    return Outcome(recipe, metric, value, flops, bar, met, note=note)
