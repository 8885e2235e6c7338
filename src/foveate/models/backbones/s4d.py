"""ViS4mer on S4D: long sequences of image tokens through state spaces, pooled from block to block.

The parameters of a layer have the names and shapes of `S4D` in state-spaces/s4, those of the model
the names of md-mohaiminul/ViS4mer. (ViS4mer's own checkpoints hold the older S4 layer with a
low-rank correction; they do not fit a diagonal one.)

Legend: B videos, L places of the sequence, K tokens that are left, D channels, n pairs of states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, gelu

from foveate import ops
from foveate.models.backbones.stream import Stream, seams


@dataclass(frozen=True)
class ViS4merConfig:
    """The dimensions of a ViS4mer.

    Args:
        inputs: channels of the image tokens.
        hidden: D of the first block; every block halves it.
        blocks: S4 blocks.
        state: states of a channel (half as many conjugate pairs).
        classes: of the head.
        dropout: in training, of whole channels.
        mask_generator: add S5's mask generator, which a plain forward ignores.
        recurrent: S4 layers run as recurrences in place of convolutions: the same result with less
            memory at many channels, and more time.

    Raises:
        ValueError: a value is out of range or `hidden` cannot be halved so often.
    """

    inputs: int = 1024
    hidden: int = 1024
    blocks: int = 3
    state: int = 64
    classes: int = 10
    dropout: float = 0.2
    mask_generator: bool = False
    recurrent: bool = False

    model_type: ClassVar[str] = "vis4mer"

    def __post_init__(self) -> None:
        for name in ("inputs", "hidden", "blocks", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.state < 2 or self.state % 2:
            raise ValueError(f"state must be even and at least 2, got {self.state}.")
        if self.hidden % 2**self.blocks:
            raise ValueError(f"{self.hidden} channels cannot be halved {self.blocks} times.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")


class S4DKernel(nn.Module):
    """The parameters of diagonal state spaces, one per channel."""

    def __init__(self, dim: int, state: int) -> None:
        super().__init__()
        pairs = state // 2
        low, high = math.log(0.001), math.log(0.1)
        self.log_dt = nn.Parameter(torch.rand(dim) * (high - low) + low)
        self.C = nn.Parameter(torch.view_as_real(torch.randn(dim, pairs, dtype=torch.cfloat)))
        self.log_A_real = nn.Parameter(torch.full((dim, pairs), 0.5).log())
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs).float().repeat(dim, 1))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Rates and weights, complex [D, n] each, for `ops.diagonal_kernel`."""
        A_Dn = torch.complex(-self.log_A_real.float().exp(), self.A_imag.float())
        rate_Dn = A_Dn * self.log_dt.float().exp()[:, None]
        C_Dn = torch.view_as_complex(self.C.float().contiguous())
        return rate_Dn, C_Dn * (rate_Dn.exp() - 1) / A_Dn


class S4D(nn.Module):
    """One S4D layer: a diagonal state space per channel, GELU, and a gated mix of channels."""

    def __init__(self, dim: int, state: int, dropout: float = 0.0, recurrent: bool = False) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.D = nn.Parameter(torch.randn(dim))
        self.kernel = S4DKernel(dim, state)
        self.dropout = nn.Dropout1d(dropout)
        self.output_linear = nn.Sequential(nn.Conv1d(dim, 2 * dim, 1), nn.GLU(dim=-2))

    def forward(
        self, x_BDK: Tensor, place_BK: Tensor | None = None, length: int | None = None
    ) -> Tensor:
        """[B, D, K] -> [B, D, K].

        Args:
            x_BDK: input.
            place_BK: place of every token in a sequence of `length`, ascending: the kernel is
                evaluated at the true distances. None: one token follows the other.
            length: L; needed with places.
        """
        y_BDK = self._mix(x_BDK, place_BK, length) + x_BDK * self.D[:, None]
        return self.output_linear(self.dropout(gelu(y_BDK)))

    def _mix(self, x_BDK: Tensor, place_BK: Tensor | None, length: int | None) -> Tensor:
        rate_Dn, weight_Dn = self.kernel()
        if self.recurrent:
            return ops.diagonal_recurrence(x_BDK, rate_Dn, weight_Dn, place_BK)
        if place_BK is None:
            kernel_DL = ops.diagonal_kernel(rate_Dn, weight_Dn, x_BDK.shape[2])
            return ops.fft_convolve(x_BDK, kernel_DL)
        assert length is not None
        # Zeros at the places without a token are no input, so this is the kernel at the true
        # distances; only the convolution runs at full length.
        index_BDK = place_BK[:, None].expand_as(x_BDK)
        x_BDL = x_BDK.new_zeros(*x_BDK.shape[:2], length).scatter(2, index_BDK, x_BDK)
        kernel_DL = ops.diagonal_kernel(rate_Dn, weight_Dn, length)
        return ops.fft_convolve(x_BDL, kernel_DL).gather(2, index_BDK)


class MaskGenerator(nn.Module):
    """S5's mask generator: a momentum copy of the first S4 layer and its norm, and a linear layer.

    Neither gradients nor an optimiser reach the copy; `momentum_update` moves it after every step.
    """

    def __init__(self, config: ViS4merConfig) -> None:
        super().__init__()
        self.norm_mom = nn.LayerNorm(config.hidden)
        self.s4_mom = S4D(config.hidden, config.state, recurrent=config.recurrent)
        self.norm = nn.LayerNorm(config.hidden)
        self.linear = nn.Linear(config.hidden, 2)
        for module in (self.norm_mom, self.s4_mom):
            module.requires_grad_(False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Logits of keeping and dropping every token, [B, L, D] -> [B, L, 2]."""
        with torch.no_grad():
            guide_BDL = self.s4_mom(self.norm_mom(x_BLD).transpose(1, 2))
        return self.linear(self.norm(guide_BDL.transpose(1, 2)))


class ViS4mer(nn.Module):
    """ViS4mer: image tokens of a whole video, in order of time, to one prediction.

    Args:
        config: dimensions.

    Raises:
        ValueError: from `forward`, when the input has another width, or too few tokens to pool.

    Example:
        >>> model = ViS4mer(ViS4merConfig(inputs=8, hidden=16, blocks=2, state=4)).eval()
        >>> model(torch.zeros(1, 20, 8)).shape
        torch.Size([1, 10])

    Source: arXiv 2204.01692; the layer: S4D, arXiv 2206.11893; the mask: S5, arXiv 2303.14526.
    """

    def __init__(self, config: ViS4merConfig | None = None) -> None:
        super().__init__()
        config = config or ViS4merConfig()
        self.config = config
        widths = [config.hidden // 2**index for index in range(config.blocks + 1)]
        self.encoder = nn.Linear(config.inputs, config.hidden)
        self.s4_layers = nn.ModuleList(
            S4D(width, config.state, config.dropout, config.recurrent) for width in widths[:-1]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[:-1])
        self.linears = nn.ModuleList(nn.Linear(width, width // 2) for width in widths[:-1])
        self.dropout = nn.Dropout1d(config.dropout)
        self.decoder = nn.Linear(widths[-1], config.classes)
        self.mask_generator = MaskGenerator(config) if config.mask_generator else None
        if self.mask_generator is not None:
            self.update_momentum(0.0)
        self.seams = seams(config.blocks)

    def forward(self, tokens_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Logits [B, classes] of videos, given the tokens of all their frames, [B, L, inputs].

        Args:
            tokens_BLD: tokens, frame after frame.
            mask_BL: [B, L] of 0 and 1, as in training: what is 0 is no input of the first block,
                whose length stays; gradients reach the mask.
        """
        stream = Stream((self.encode(tokens_BLD),), tokens_BLD.shape[1], mask_BK=mask_BL)
        for index in range(self.config.blocks):
            stream = self._block(index, self.seams[index](stream))
        (x_BKD,) = self.seams[self.config.blocks](stream).states
        return self.decoder(x_BKD.mean(1))

    def encode(self, tokens_BLD: Tensor) -> Tensor:
        """The tokens at the width of the first block, [B, L, D]."""
        config = self.config
        least = 2**config.blocks
        if tokens_BLD.dim() != 3 or tokens_BLD.shape[2] != config.inputs:
            raise ValueError(
                f"ViS4mer takes tokens [B, L, {config.inputs}], got {tuple(tokens_BLD.shape)}."
            )
        if tokens_BLD.shape[1] < least:
            raise ValueError(
                f"{config.blocks} blocks halve the sequence as often: it needs at least {least} "
                f"tokens, got {tokens_BLD.shape[1]}."
            )
        return tokens_BLD if config.inputs == config.hidden else self.encoder(tokens_BLD)

    def keep_logits(self, x_BLD: Tensor) -> Tensor | None:
        """What the mask generator says of encoded tokens, [B, L, 2]; None: there is none."""
        return None if self.mask_generator is None else self.mask_generator(x_BLD)

    @torch.no_grad()
    def update_momentum(self, decay: float) -> None:
        """Move the mask generator's copy towards the first layer, after every optimiser step."""
        if self.mask_generator is None:
            raise ValueError("This model has no mask generator; set mask_generator=True.")
        momentum_update(self.mask_generator.norm_mom, self.norms[0], decay)
        momentum_update(self.mask_generator.s4_mom, self.s4_layers[0], decay)

    def _block(self, index: int, stream: Stream) -> Stream:
        (x_BKD,), mask_BK = stream.states, stream.mask_BK
        place_BK = stream.place_BK if stream.gaps else None
        if x_BKD.shape[1] < 2:
            raise ValueError(f"Block {index} needs two tokens to pool, one is left: keep more.")
        # Masked behind the norm, which would give a token of zeros its bias, and not in front of it
        # as well: the gradient of a mask of 0 has to say what the token would have been.
        z_BKD = _masked(self.norms[index](x_BKD), mask_BK)
        z_BDK = self.s4_layers[index](z_BKD.transpose(1, 2), place_BK, stream.length)
        x_BDK = _masked(x_BKD, mask_BK).transpose(1, 2) + self.dropout(z_BDK)
        x_BKD = gelu(self.linears[index](avg_pool1d(x_BDK, 2).transpose(1, 2)))
        if place_BK is None:
            return Stream((x_BKD,), stream.length // 2)
        # A pair of tokens is where its second one is; all tokens kept, that is every place.
        place_BK = place_BK[:, 1 : 2 * x_BKD.shape[1] : 2] // 2
        return Stream((x_BKD,), (stream.length + 1) // 2, place_BK)


def _masked(x_BKD: Tensor, mask_BK: Tensor | None) -> Tensor:
    return x_BKD if mask_BK is None else x_BKD * mask_BK[..., None].to(x_BKD.dtype)


@torch.no_grad()
def momentum_update(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Exponential moving average: every parameter becomes decay * target + (1 - decay) * source.

    Args:
        target: the slow copy.
        source: of the same architecture.
        decay: in [0, 1]; 0 copies, 1 leaves the target alone.

    Raises:
        ValueError: the decay is out of range, or the modules have other parameters.

    Example:
        >>> slow, fast = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> slow.weight.data.fill_(0.0); fast.weight.data.fill_(1.0)
        tensor([[0.]])
        tensor([[1.]])
        >>> momentum_update(slow, fast, 0.75); slow.weight.item()
        0.25
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}.")
    mine, theirs = dict(target.named_parameters()), dict(source.named_parameters())
    if {name: p.shape for name, p in mine.items()} != {name: p.shape for name, p in theirs.items()}:
        raise ValueError("The two modules have parameters of other names or shapes.")
    for name, parameter in mine.items():
        parameter.mul_(decay).add_(theirs[name].to(parameter), alpha=1 - decay)
