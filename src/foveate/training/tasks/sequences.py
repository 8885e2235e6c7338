"""A ViS4mer that reads the order of planted tokens in noise, S5 on it, and its pre-training.

Legend: B videos, L tokens, D channels, K tokens kept, C classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import foveate
from foveate import ops
from foveate.methods._s5_training import random_mask, selective_loss
from foveate.methods.s5 import S5
from foveate.models.backbones import ViS4mer, ViS4merConfig, momentum_update
from foveate.models.backbones.s4d import S4D
from foveate.training.loop import Tell
from foveate.training.sizes import Stage
from foveate.training.task import Outcome, Task, TaskSize, numbers_of
from foveate.training.tasks.sequences_clips import Embedder, clips_loss, predictor
from foveate.training.tasks.sequences_data import ORDERS, draw_clips, draw_videos

#: Share of tokens that the mask generator is trained to keep, and weight of its loss.
RETAIN, RATIO_WEIGHT = 0.25, 10.0
#: Of the copies that no gradient reaches.
MOMENTUM = 0.99
#: Streams of random numbers: the first two stages, those behind them, clips, what probes are fitted
#: to, and what everything is measured on. What was tried was measured on the last.
_FIRST, _SECOND, _THEN, _CLIPS, PROBED, HELD_OUT, TRIED = range(7)
#: Learning rates over that of the stage: of the time steps, of what pools, of the classifier, of
#: the mask generator and of its bias, which alone has to follow the ratio.
_STEPS, _POOLED, _CLASSIFIER, _GENERATOR, _BIAS = 0.1, 3.0, 10.0, 2.0, 6.0
#: Share of tokens that the stage "s5" begins with, and part of it in which that falls to RETAIN.
_BEGIN, _FALLING = 0.9, 0.6
#: Stages that train the decoder with a form of the method, by whose name they go.
_FORMS: tuple[Literal["zero", "gather"], ...] = ("zero", "gather")


class Sequences(Task):
    """Noise tokens with three to five planted ones; the order of their symbols is the class.

    The first two stages train one ViS4mer on all tokens of short and of long videos. From its
    weights three go on, equally long: "s5" trains decoder and mask generator together, and behind
    it "zero" and "gather" the decoder alone, on the tokens that either form of the method keeps;
    "random" reads random masks of the same share, "s4" all tokens. "lsmcl" trains without labels,
    from the beginning.

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
        self.width, self.patches = (16, 8) if tiny else (64, 16)
        self.frames = 8 if tiny else 32
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
        few = Stage(3, 4, 3e-3, 1)
        # All three readings of the order train as long: "s5" and one of its forms, "random", "s4".
        masks, form = Stage(1300, 16, 5e-3, 20), Stage(500, 16, 5e-3, 20)
        whole = Stage(masks.steps + form.steps, 16, 5e-3, 20)
        small = {
            "short": Stage(2500, 16, 1e-2, 40),
            "long": Stage(2500, 16, 1e-2, 40),
            "s5": masks,
            "zero": form,
            "gather": form,
            "random": whole,
            "s4": whole,
            "lsmcl": Stage(900, 64, 1e-2, 40),
        }
        self.stages = dict.fromkeys(small, few) if tiny else small
        self.held_out = 16 if tiny else 1024

    # -- training ---------------------------------------------------------------------------------

    def build(self) -> dict[str, nn.Module]:
        """The models by the names of their stages, and what LSMCL needs."""
        names = ("first", "s5", *_FORMS, "random", "s4")
        clips = ("untrained", "lsmcl", "slow")
        return {
            **{name: ViS4mer(self.config) for name in names},
            **{name: Embedder(self.config) for name in clips},
            "predictor": predictor(),
        }

    def groups(self, stage: str, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, float]]:
        """What a stage trains; copies that move on their own are never among it."""
        if stage == "lsmcl":
            embedder = modules[stage]
            assert isinstance(embedder, Embedder)
            return [*_body(embedder.body), (embedder.projector, 1.0), (modules["predictor"], 1.0)]
        model = _trained(stage, modules)
        trained = [*_body(model), (model.decoder, _CLASSIFIER)]
        if stage == "s5":
            generator = model.mask_generator
            assert generator is not None
            weight, bias = generator.linear.weight, generator.linear.bias
            trained += [(generator.norm, _GENERATOR), (nn.ParameterList([weight]), _GENERATOR)]
            trained.append((nn.ParameterList([bias]), _BIAS))
        return trained

    @torch.no_grad()
    def begin(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Go on from the weights of the stage before."""
        if stage == "lsmcl":
            for name in ("lsmcl", "slow"):
                modules[name].load_state_dict(modules["untrained"].state_dict())
            return
        model = _trained(stage, modules)
        if stage in _FORMS:
            model.load_state_dict(modules["s5"].state_dict())
        elif model is not modules["first"]:
            model.load_state_dict(modules["first"].state_dict())
            model.update_momentum(0.0)
        if stage == "s5":
            self._centre(model)

    def _centre(self, model: ViS4mer) -> None:
        """Let the mask generator begin with most tokens, and with features about their mean.

        A decoder that loses most tokens at once forgets what they have to teach; and a feature
        that all tokens have would do nothing but follow the ratio of them all.
        """
        generator = model.mask_generator
        assert generator is not None
        generator.linear.bias.copy_(torch.tensor([_BEGIN, 1 - _BEGIN]).log())
        tokens_BLD = self.videos(_THEN, 0, self.stages["s5"].clips)["tokens"]
        x_BLD = model.encode(tokens_BLD.to(generator.norm.bias.device))
        guide_BDL = generator.s4_mom(generator.norm_mom(x_BLD).transpose(1, 2))
        generator.norm.bias.sub_(generator.norm(guide_BDL.transpose(1, 2)).mean((0, 1)))

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """Videos with labels, and the noise that decides masks."""
        clips = self.stages[stage].clips
        if stage == "lsmcl":
            return self.clips(_CLIPS, step, clips)
        stream = {"short": _FIRST, "long": _SECOND}.get(stage, _THEN)
        # The forms go on where "s5" stops.
        done = self.stages["s5"].steps if stage in _FORMS else 0
        batch = self.videos(stream, done + step, clips, short=stage == "short")
        part = step / self.stages[stage].steps
        more = (_BEGIN - RETAIN) * max(0.0, 1 - part / _FALLING)
        return batch | {"ratio": torch.tensor(RETAIN + more)}

    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the order, with a mask generator its ratio; of clips, InfoNCE."""
        if stage == "lsmcl":
            fast, slow, predict = modules["lsmcl"], modules["slow"], modules["predictor"]
            loss, found = clips_loss(fast, slow, predict, batch)
            return loss, {"found": found}
        model, tokens_BLD = _trained(stage, modules), batch["tokens"]
        mask_BL = None
        if stage == "s5":
            mask_BL = drawn_mask(model, tokens_BLD, batch["gumbel"])
        elif stage == "random":
            mask_BL = random_mask(batch["gumbel"][..., 0], RETAIN)
        if stage in _FORMS:
            with foveate.reduce(model, S5(stage), retain=RETAIN):
                logits_BC = model(tokens_BLD)
        else:
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
        """Move the copies that no gradient reaches."""
        if stage == "s5":
            _trained(stage, modules).update_momentum(MOMENTUM)
        elif stage == "lsmcl":
            momentum_update(modules["slow"], modules[stage], MOMENTUM)

    # -- data -------------------------------------------------------------------------------------

    def videos(
        self, stream: int, step: int, count: int, *, short: bool = False
    ) -> dict[str, Tensor]:
        """Videos of a stream of random numbers, and noise; short ones have a quarter of frames."""
        draw = numbers_of(self.seed, stream, step)
        frames = max(5, self.frames // 4) if short else self.frames
        drawn = draw_videos(draw, count, frames, self.patches, self.width)
        batch = {name: torch.from_numpy(value) for name, value in drawn._asdict().items()}
        gumbel = draw.gumbel(size=(*drawn.planted.shape, 2)).astype(np.float32)
        return batch | {"gumbel": torch.from_numpy(gumbel)}

    def clips(self, stream: int, step: int, count: int) -> dict[str, Tensor]:
        """Videos of half as many frames, a short clip of each, and noise."""
        draw = numbers_of(self.seed, stream, step)
        frames = max(5, self.frames // 2)
        drawn, short = draw_clips(draw, count, frames, self.patches, self.width)
        noises = {
            f"{name}_noise": draw.random(tokens.shape[:2], np.float32)
            for name, tokens in (("long", drawn.tokens), ("short", short))
        }
        arrays = drawn._asdict() | {"long": drawn.tokens, "short": short} | noises
        del arrays["tokens"]
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    # -- measurement ------------------------------------------------------------------------------

    def measure(self, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
        """Order, planted tokens and mask of S5, beside all tokens and random masks; and LSMCL."""
        from foveate.training.tasks.sequences_measure import measure

        return measure(self, modules, tell)


def drawn_mask(model: ViS4mer, tokens_BLD: Tensor, gumbel_BL2: Tensor) -> Tensor:
    """The mask generator's mask with this noise, [B, L] of 0 and 1 with gradients."""
    logits_BL2 = model.keep_logits(model.encode(tokens_BLD))
    assert logits_BL2 is not None
    return ops.gumbel_keep(logits_BL2, noise=gumbel_BL2)


def _trained(stage: str, modules: dict[str, nn.Module]) -> ViS4mer:
    """The model that a stage of the order trains."""
    model = modules.get(stage, modules["first"])
    assert isinstance(model, ViS4mer)
    return model


def _body(model: ViS4mer) -> list[tuple[nn.Module, float]]:
    """All but the classifier, with learning rates as S4D has them.

    Time steps learn slowly. The rates stay at their start, of which the time step makes the scale.
    """
    trained: list[tuple[nn.Module, float]] = [(model.norms, 1.0), (model.linears, _POOLED)]
    for layer in model.s4_layers:
        assert isinstance(layer, S4D)
        trained.append((nn.ParameterList([layer.kernel.log_dt]), _STEPS))
        trained.append((nn.ParameterList([layer.kernel.C, layer.D]), 1.0))
        trained.append((layer.output_linear, 1.0))
    return trained
