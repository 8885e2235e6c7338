"""MixSTE: lifts sequences of 2D poses to 3D with attention over joints and over frames in turn.

The parameters have the names and shapes of the official implementations (MixSTE, and HoT's
`hot_mixste.py` and `tpc_mixste.py`), so that published weights load with `load_state_dict`.

Legend: B sequences, F frames, K frames that are left, J joints, C channels, H heads, d channels of
a head, N tokens of one attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from foveate.models.backbones.stream import Stream, seams


@dataclass(frozen=True)
class MixSTEConfig:
    """The dimensions of a MixSTE.

    Args:
        frames: F, length of the sequences.
        joints: J.
        hidden: C.
        pairs: blocks of either kind.
        heads: attention heads.
        mlp_ratio: width inside the MLP over C.
        inputs: numbers per joint and frame of the input.
        outputs: numbers per joint and frame of the output.
        slots: frames that a Hourglass Tokenizer (HoT) trained with this model keeps: adds its slot
            embedding, frame queries and recovering attention, which a plain forward ignores; 0:
            none.

    Raises:
        ValueError: a number is out of range or `heads` does not divide `hidden`.
    """

    frames: int = 243
    joints: int = 17
    hidden: int = 512
    pairs: int = 8
    heads: int = 8
    mlp_ratio: float = 2.0
    inputs: int = 2
    outputs: int = 3
    slots: int = 0

    model_type: ClassVar[str] = "mixste"

    def __post_init__(self) -> None:
        for name in ("frames", "joints", "hidden", "pairs", "heads", "inputs", "outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {self.hidden} channels.")
        if not 0 <= self.slots <= self.frames:
            raise ValueError(f"slots must be in 0 .. {self.frames} frames, got {self.slots}.")


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        qkv = self.qkv(x_BNC).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out_BHNd = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(out_BHNd.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """The parameters of HoT's recovering attention; `foveate.ops.cross_attention` computes it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: MixSTEConfig) -> None:
        super().__init__()
        dim = config.hidden
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, config.heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x_BNC = x_BNC + self.attn(self.norm1(x_BNC))
        return x_BNC + self.mlp(self.norm2(x_BNC))


class MixSTE(nn.Module):
    """MixSTE, with the parameter layout of the official code.

    Every pair is a block over the joints of a frame and one over the frames of a joint; one norm
    per kind is shared by all pairs.

    Args:
        config: dimensions.

    Raises:
        ValueError: from `forward`, when the input has another shape than the configuration says.

    Example:
        >>> model = MixSTE(MixSTEConfig(frames=9, joints=4, hidden=16, pairs=2, heads=2)).eval()
        >>> model(torch.zeros(1, 9, 4, 2)).shape
        torch.Size([1, 9, 4, 3])

    Source: arXiv 2203.00859; layout of NationalGAILab/HoT, `model/mixste`.
    """

    def __init__(self, config: MixSTEConfig | None = None) -> None:
        super().__init__()
        config = config or MixSTEConfig()
        self.config = config
        dim = config.hidden
        self.Spatial_patch_to_embedding = nn.Linear(config.inputs, dim)
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, config.joints, dim))
        self.Temporal_pos_embed = nn.Parameter(torch.zeros(1, config.frames, dim))
        self.STEblocks = nn.ModuleList(Block(config) for _ in range(config.pairs))
        self.TTEblocks = nn.ModuleList(Block(config) for _ in range(config.pairs))
        self.Spatial_norm = nn.LayerNorm(dim, eps=1e-6)
        self.Temporal_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, config.outputs))
        if config.slots:
            self.pos_embed_token = nn.Parameter(torch.zeros(1, config.slots, dim))
            self.x_token = nn.Parameter(torch.zeros(1, config.frames, dim))
            self.cross_attention = CrossAttention(dim)
        self.seams = seams(config.pairs)

    def forward(self, poses_BFJ2: Tensor) -> Tensor:
        """Lift sequences, [B, F, J, inputs] -> [B, F, J, outputs] (or the frames that are left)."""
        config = self.config
        expected = (config.frames, config.joints, config.inputs)
        if poses_BFJ2.dim() != 4 or tuple(poses_BFJ2.shape[1:]) != expected:
            raise ValueError(
                f"MixSTE takes sequences [B, {', '.join(map(str, expected))}] (frames, joints, "
                f"coordinates), got {tuple(poses_BFJ2.shape)}."
            )
        x_BFJC = self.Spatial_patch_to_embedding(poses_BFJ2) + self.Spatial_pos_embed
        stream = Stream((x_BFJC,), config.frames)
        for index in range(config.pairs):
            stream = self.seams[index](stream)
            (x_BKJC,) = stream.states
            x_BKJC = self._over_joints(index, x_BKJC)
            if index == 0:
                time_FC = self.Temporal_pos_embed[0]
                if stream.place_BK is not None:
                    time_FC = time_FC[stream.place_BK]
                x_BKJC = x_BKJC + time_FC[..., None, :]
            x_BKJC = self._over_frames(index, x_BKJC)
            stream = stream.behind(x_BKJC)
        (x_BKJC,) = self.seams[config.pairs](stream).states
        return self.head(x_BKJC)

    def _over_joints(self, index: int, x_BKJC: Tensor) -> Tensor:
        y_NJC = self.STEblocks[index](x_BKJC.flatten(0, 1))
        return self.Spatial_norm(y_NJC).unflatten(0, x_BKJC.shape[:2])

    def _over_frames(self, index: int, x_BKJC: Tensor) -> Tensor:
        x_BJKC = x_BKJC.transpose(1, 2)
        y_NKC = self.TTEblocks[index](x_BJKC.flatten(0, 1))
        return self.Temporal_norm(y_NKC).unflatten(0, x_BJKC.shape[:2]).transpose(1, 2)
