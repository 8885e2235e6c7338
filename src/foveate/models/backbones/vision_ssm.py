"""Vision Mamba: images through selective state spaces that scan the patches in several directions.

Two paths and a [CLS] in the middle give Vim, with the parameter names and shapes of the official
implementation (`vim/models_mamba.py`, bimamba v2), so that published weights load with
`load_state_dict`. Four serpentine paths over the grid and the mean of all patches give a model in
the manner of PlainMamba; its official layout (one set of weights for all paths) is another.

Legend: B images, N tokens of an image, K of them left, C channels, E inner channels, S states, R
rank of the step size, P scan paths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate import ops
from foveate.models.backbones.stream import Stream, Tap, seams

#: What the parameters of the scan paths are called: A_log, A_b_log, ...; conv1d, conv1d_b, ...
_PATHS = ("", "_b", "_c", "_d")


@dataclass(frozen=True)
class VisionMambaConfig:
    """The dimensions of a Vision Mamba; the defaults are Vim-Tiny.

    Args:
        image_size: side of the square images in pixels.
        patch_size: side of a patch in pixels.
        stride: step from patch to patch in pixels; None: a patch.
        channels: of the images.
        depth: blocks.
        hidden: C.
        state: S.
        expand: E over C.
        conv: width of the causal convolution in tokens.
        paths: 2 (forwards and back) or 4 (serpentines along rows and columns).
        pool: "cls": the head reads a [CLS] token in the middle of the sequence; "mean": the mean
            of all patches, without [CLS].
        divide: halve the sum of the paths (more generally their mean), as Vim's "div2" models do.
        classes: of the head; 0: none.
        eps: of the norms.
        residual_in_fp32: the residual stream stays in float32 in a model of half precision.

    Raises:
        ValueError: a value is out of range.
    """

    image_size: int = 224
    patch_size: int = 16
    stride: int | None = None
    channels: int = 3
    depth: int = 24
    hidden: int = 192
    state: int = 16
    expand: int = 2
    conv: int = 4
    paths: int = 2
    pool: Literal["cls", "mean"] = "cls"
    divide: bool = True
    classes: int = 1000
    eps: float = 1e-5
    residual_in_fp32: bool = True

    model_type: ClassVar[str] = "vision_mamba"

    def __post_init__(self) -> None:
        for name in ("patch_size", "channels", "depth", "hidden", "state", "expand", "conv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is below patch_size {self.patch_size}.")
        if self.paths not in (2, 4):
            raise ValueError(f"paths must be 2 or 4, got {self.paths}.")
        if self.pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", got {self.pool!r}.')
        if self.paths == 4 and self.pool == "cls":
            raise ValueError('Four paths run over the grid, which has no [CLS]: use pool="mean".')

    @property
    def side(self) -> int:
        """Patches along one side."""
        return (self.image_size - self.patch_size) // (self.stride or self.patch_size) + 1

    @property
    def num_tokens(self) -> int:
        """N, the [CLS] token included."""
        return self.side**2 + (self.pool == "cls")

    @property
    def cls_place(self) -> int | None:
        """Place of [CLS] in the full sequence; None: there is none."""
        return self.side**2 // 2 if self.pool == "cls" else None

    @property
    def inner(self) -> int:
        """E."""
        return self.expand * self.hidden

    @property
    def rank(self) -> int:
        """R."""
        return math.ceil(self.hidden / 16)


class VisionMambaOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: [B, classes]; the pooled features where there is no head.
        last_hidden_state: [B, N, C] behind the last norm (of the tokens that are left).
    """

    logits: Tensor
    last_hidden_state: Tensor


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in the dtype of the weight."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(self.weight.dtype)


class PatchEmbed(nn.Module):
    """A convolution that makes a token of every patch."""

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.channels, config.hidden, config.patch_size, config.stride or config.patch_size
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, patches, C]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Mixer(nn.Module):
    """Selective state spaces along every scan path, averaged.

    A path meets the tokens that are left in its own order: the convolution sees kept neighbours,
    the scan steps over the gaps between them.
    """

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.config = config
        E, S, R = config.inner, config.state, config.rank
        self.in_proj = nn.Linear(config.hidden, 2 * E, bias=False)
        for path in _PATHS[: config.paths]:
            setattr(self, f"conv1d{path}", nn.Conv1d(E, E, config.conv, groups=E, padding=0))
            setattr(self, f"x_proj{path}", nn.Linear(E, R + 2 * S, bias=False))
            setattr(self, f"dt_proj{path}", _step_projection(R, E))
            rate_ES = torch.arange(1.0, S + 1).repeat(E, 1)
            self.register_parameter(f"A{path}_log", nn.Parameter(rate_ES.log()))
            self.register_parameter(f"D{path}", nn.Parameter(torch.ones(E)))
        self.out_proj = nn.Linear(E, config.hidden, bias=False)
        self.gated = Tap()

    def forward(self, x_BKC: Tensor, order_PBK: Tensor, gap_PBK: Tensor | None) -> Tensor:
        """[B, K, C] -> [B, K, C].

        Args:
            x_BKC: tokens that are left.
            order_PBK: in which order every path meets them, [P, 1 or B, K].
            gap_PBK: places without a token before each, in that order; None: none.
        """
        xz_B2EK = self.in_proj(x_BKC).transpose(1, 2)
        outs = []
        for path, order_BK in enumerate(order_PBK):
            index_B1K = order_BK[:, None].expand(x_BKC.shape[0], xz_B2EK.shape[1], -1)
            met_BEK, gate_BEK = xz_B2EK.gather(2, index_B1K).chunk(2, 1)
            gap_BK = None if gap_PBK is None else gap_PBK[path]
            y_BEK = self._scan(path, met_BEK, gate_BEK, gap_BK)
            back_B1K = index_B1K[:, : y_BEK.shape[1]]
            outs.append(torch.empty_like(y_BEK).scatter(2, back_B1K, y_BEK))
        y_PBKE = self.gated(torch.stack(outs).transpose(2, 3))
        y_BKE = y_PBKE.mean(0) if self.config.divide else y_PBKE.sum(0)
        return self.out_proj(y_BKE)

    def _scan(self, path: int, x_BEK: Tensor, z_BEK: Tensor, gap_BK: Tensor | None) -> Tensor:
        name, config = _PATHS[path], self.config
        conv = getattr(self, f"conv1d{name}")
        x_BEK = silu(conv(nn.functional.pad(x_BEK, (config.conv - 1, 0))))
        projected = getattr(self, f"x_proj{name}")(x_BEK.transpose(1, 2))
        step_BKR, B_BKS, C_BKS = projected.split((config.rank, config.state, config.state), -1)
        step = getattr(self, f"dt_proj{name}")
        return ops.selective_scan(
            x_BEK,
            (step_BKR @ step.weight.T).transpose(1, 2),
            -getattr(self, f"A{name}_log").float().exp(),
            B_BKS.transpose(1, 2),
            C_BKS.transpose(1, 2),
            D_E=getattr(self, f"D{name}"),
            z_BEL=z_BEK,
            delta_bias_E=step.bias,
            gap_BL=gap_BK,
        )


class Block(nn.Module):
    """Add, norm, mix: hidden states and the residual stream go on side by side."""

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.wide = config.residual_in_fp32
        self.mixer = Mixer(config)
        self.norm = RMSNorm(config.hidden, config.eps)

    def forward(
        self, x_BKC: Tensor, residual_BKC: Tensor, order_PBK: Tensor, gap_PBK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and residual stream behind the block."""
        residual_BKC = residual_BKC + x_BKC
        if self.wide:
            residual_BKC = residual_BKC.to(torch.promote_types(residual_BKC.dtype, torch.float32))
        return self.mixer(self.norm(residual_BKC), order_PBK, gap_PBK), residual_BKC


class VisionMamba(nn.Module):
    """Vision Mamba, with Vim's parameter layout where it has two paths and a [CLS].

    Args:
        config: dimensions.

    Raises:
        ValueError: from `forward`, when the images have another shape than the configuration says.

    Example:
        >>> config = VisionMambaConfig(image_size=32, patch_size=8, depth=2, hidden=16, classes=5)
        >>> VisionMamba(config).eval()(torch.zeros(2, 3, 32, 32)).logits.shape
        torch.Size([2, 5])

    Source: Vim, arXiv 2401.09417 (hustvl/Vim); serpentine paths: PlainMamba, arXiv 2403.17695.
    """

    rank_PN: Tensor

    def __init__(self, config: VisionMambaConfig | None = None) -> None:
        super().__init__()
        config = config or VisionMambaConfig()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        if config.pool == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.hidden))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_f = RMSNorm(config.hidden, config.eps)
        self.head: nn.Module = nn.Identity()
        if config.classes:
            self.head = nn.Linear(config.hidden, config.classes)
        self.seams = seams(config.depth)
        self.register_buffer("rank_PN", _ranks(config), persistent=False)
        for parameter in (self.pos_embed, getattr(self, "cls_token", None)):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> VisionMambaOutput:
        """Logits and features of images [B, channels, image_size, image_size]."""
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"This model takes images [B, {', '.join(map(str, expected))}], got "
                f"{tuple(images.shape)}."
            )
        x_BNC = self.patch_embed(images)
        if config.cls_place is not None:
            cls_B1C = self.cls_token.expand(x_BNC.shape[0], -1, -1)
            before, after = x_BNC[:, : config.cls_place], x_BNC[:, config.cls_place :]
            x_BNC = torch.cat([before, cls_B1C, after], dim=1)
        x_BNC = x_BNC + self.pos_embed
        stream = Stream((x_BNC, torch.zeros_like(x_BNC)), config.num_tokens)
        walk = self._walk(stream)
        for index, layer in enumerate(self.layers):
            left = self.seams[index](stream)
            if left is not stream:
                walk = self._walk(left)
            stream = left.behind(*layer(*left.states, *walk))
        stream = self.seams[config.depth](stream)
        x_BKC, residual_BKC = stream.states
        y_BKC = self.norm_f(residual_BKC + x_BKC)
        # [CLS] stays in the middle, however many tokens are left.
        pooled_BC = y_BKC.mean(1) if config.pool == "mean" else y_BKC[:, y_BKC.shape[1] // 2]
        return VisionMambaOutput(self.head(pooled_BC), y_BKC)

    def _walk(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """How the paths meet the tokens, for all blocks up to the next change."""
        if stream.place_BK is None:
            return self.rank_PN.argsort(-1)[:, None], None
        order_PBK, gap_PBK = ops.path_gaps(self.rank_PN, stream.place_BK)
        return order_PBK, gap_PBK if stream.gaps else None


def _ranks(config: VisionMambaConfig) -> Tensor:
    if config.paths == 4:
        return ops.serpentine_ranks(config.side, config.side)
    forwards_N = torch.arange(config.num_tokens)
    return torch.stack([forwards_N, forwards_N.flip(0)])


def _step_projection(rank: int, inner: int) -> nn.Linear:
    """Mamba's start: step sizes between 0.001 and 0.1, whatever the input."""
    layer = nn.Linear(rank, inner)
    nn.init.uniform_(layer.weight, -(rank**-0.5), rank**-0.5)
    low, high = math.log(0.001), math.log(0.1)
    step_E = (torch.rand(inner) * (high - low) + low).exp().clamp_min(1e-4)
    with torch.no_grad():
        layer.bias.copy_(step_E + (-torch.expm1(-step_E)).log())
    return layer


def places_around_cls(source_BK: Tensor, cls_place: int) -> Tensor:
    """Places of kept tokens when [CLS] sits anywhere among them, strictly ascending, int64 [B, K].

    Between two kept patches lie as many dropped ones as before; [CLS] is a step of its own wherever
    it is, and stays as near to its old place as its neighbours allow.

    Args:
        source_BK: places in the full sequence, patches ascending, `cls_place` once per row and
            neither first nor last.
        cls_place: of [CLS] in the full sequence.

    Example:
        >>> places_around_cls(torch.tensor([[0, 3, 1, 6], [0, 1, 3, 6]]), 3).tolist()
        [[0, 1, 2, 6], [0, 1, 3, 6]]
    """
    is_cls_BK = source_BK == cls_place
    at_B1 = is_cls_BK.int().argmax(1, keepdim=True)
    patch_BK = source_BK - (source_BK > cls_place).long()
    before_B1, after_B1 = patch_BK.gather(1, at_B1 - 1), patch_BK.gather(1, at_B1 + 1)
    cls_B1 = torch.minimum(torch.maximum(before_B1 + 1, before_B1.new_tensor(cls_place)), after_B1)
    index_K = torch.arange(source_BK.shape[1], device=source_BK.device)
    return torch.where(is_cls_BK, cls_B1, patch_BK + (index_K > at_B1).long())
