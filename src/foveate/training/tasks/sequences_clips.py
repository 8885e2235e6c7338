"""Long-short masked contrastive learning (LSMCL): short clips find their videos, without labels.

Legend: B videos, L tokens, D channels, F features, E numbers of an embedding, C classes, N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.methods._s5_training import random_mask
from foveate.methods.s5 import contrastive_loss
from foveate.models.backbones import ViS4mer, ViS4merConfig

#: Share of tokens that the random masks of both clips keep, and temperature of the loss.
_KEPT, _TEMPERATURE = 0.75, 0.2
#: Numbers of an embedding, and width of what makes it over that of the features.
_EMBEDDING, _WIDER = 32, 4


class Embedder(nn.Module):
    """A ViS4mer without its classifier, and a projector on what it makes of a video."""

    def __init__(self, config: ViS4merConfig) -> None:
        super().__init__()
        self.body = ViS4mer(config)
        self.body.decoder = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        features = config.hidden // 2**config.blocks
        self.projector = two_layers(features, _WIDER * features, _EMBEDDING)

    def forward(self, tokens_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, E]."""
        return self.projector(self.body(tokens_BLD, mask_BL))


def predictor() -> nn.Module:
    """From the embedding of a short clip to that of the long one."""
    return two_layers(_EMBEDDING, 2 * _EMBEDDING, _EMBEDDING)


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def clips_loss(
    online: nn.Module, target: nn.Module, predict: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """InfoNCE of both clips, masked at random, and the share of short ones that find their own.

    Args:
        online: embeds the short clips.
        target: its slow copy, embeds the long ones.
        predict: goes on from the short ones.
        batch: "short" [B, L, D], "long" [B, L', D], and "short_noise" [B, L], "long_noise"
            [B, L'], which decide the masks.
    """
    with torch.no_grad():
        long_BE = target(batch["long"], random_mask(batch["long_noise"], _KEPT))
    short_BE = predict(online(batch["short"], random_mask(batch["short_noise"], _KEPT)))
    loss = contrastive_loss(short_BE, long_BE, _TEMPERATURE)
    return loss, finds_own(short_BE.detach(), long_BE).mean()


def finds_own(short_NE: Tensor, long_NE: Tensor) -> Tensor:
    """1 where no other long clip is as near by cosine as the own one, else 0, float32 [N].

    Example:
        >>> finds_own(torch.eye(2), torch.tensor([[1.0, 0.1], [1.0, 0.0]])).tolist()
        [0.0, 0.0]
    """
    unit_NE, other_NE = (nn.functional.normalize(x, dim=-1) for x in (short_NE, long_NE))
    like_NN = unit_NE @ other_NE.T
    own_N1 = like_NN.diagonal()[:, None]
    # Its own is one of those at least as near.
    return ((like_NN >= own_N1).sum(1) == 1).float()


def probe(known_NF: Tensor, label_N: Tensor, asked_MF: Tensor, classes: int) -> Tensor:
    """The class that a linear probe names, int64 [M].

    The probe is the least-squares fit of features and a constant to the classes, one number for
    each.

    Args:
        known_NF: features of the samples it is fitted to.
        label_N: their classes.
        asked_MF: features of the others.
        classes: C.

    Example:
        >>> known = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
        >>> probe(known, torch.tensor([0, 0, 1, 1]), torch.tensor([[0.2], [0.9]]), 2).tolist()
        [0, 1]
    """
    mean_F, std_F = known_NF.double().mean(0), known_NF.double().std(0).clamp(min=1e-12)

    def made(x: Tensor) -> Tensor:
        x = (x.double() - mean_F) / std_F
        return torch.cat([x, torch.ones_like(x[:, :1])], 1).cpu()

    wanted_NC = nn.functional.one_hot(label_N.cpu(), classes).double()
    # The solver for features that depend on each other, which is on the CPU alone.
    fitted = torch.linalg.lstsq(made(known_NF), wanted_NC, driver="gelsd").solution
    return (made(asked_MF) @ fitted).argmax(1)
