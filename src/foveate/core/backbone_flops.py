"""FLOPs of pose transformers, vision state-space models and S4 decoders, by the rule of `flops`.

To the rule (a multiply-add is 2 FLOPs; linear layers, convolutions and attention products) two
things are added, as these backbones spend time in them: the three multiply-adds of a selective scan
per channel and state, and the Fourier transforms of a long convolution.

Legend: C width, m width of the MLP, F frames, J joints, E inner channels, S states, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2


@dataclass(frozen=True)
class PoseDims:
    """A transformer with attention over joints and over frames.

    Args:
        pairs: pairs of such blocks in a row.
        hidden: C.
        intermediate: m.
        joints: J.
        inputs: numbers per joint and frame.
        head: (inputs, outputs) of the linear layers behind the blocks.
        streams: pairs side by side at every depth: 1 (MixSTE) or 2 (MotionBERT).
    """

    pairs: int
    hidden: int
    intermediate: int
    joints: int
    inputs: int = 2
    head: tuple[tuple[int, int], ...] = ()
    streams: int = 1


def pose_flops(
    dims: PoseDims,
    frames: int,
    lengths: Sequence[int],
    *,
    recovered: bool = False,
    out_frames: int | None = None,
    attention: bool = True,
) -> int:
    """FLOPs of one sequence, given the frames that every pair of blocks sees.

    Args:
        dims: the model.
        frames: F that enter.
        lengths: frames in every pair.
        recovered: HoT's recovering attention runs behind the last pair, from `frames` queries.
        out_frames: frames that the head reads; None: all, or those left without recovery.
        attention: count the attention products; the authors' counter leaves them out.

    Raises:
        ValueError: not one length per pair.

    Example:
        >>> mixste = PoseDims(8, 512, 1024, 17, head=((512, 3),))
        >>> round(pose_flops(mixste, 243, [243] * 8, attention=False) / 1e9)
        277
    """
    _one_each("lengths", lengths, dims.pairs)
    C, J = dims.hidden, dims.joints
    token = 8 * C * C + 4 * C * dims.intermediate
    total = 2 * dims.inputs * C * frames * J
    for left in lengths:
        total += dims.streams * 2 * token * left * J
        if attention:
            total += dims.streams * 4 * C * (left * J * J + J * left * left)
    if recovered:
        total += 2 * C * C * J * (2 * frames + 2 * lengths[-1])
        total += 4 * C * J * frames * lengths[-1] * attention
    out = out_frames or (frames if recovered else lengths[-1])
    return total + sum(2 * a * b for a, b in dims.head) * out * J


@dataclass(frozen=True)
class ScanDims:
    """A vision state-space model of Mamba blocks.

    Args:
        blocks: of the model.
        hidden: C.
        inner: E.
        state: S.
        rank: of the step sizes.
        conv: width of the causal convolution.
        paths: scans per block.
        patch_inputs: numbers in a patch.
        classes: of the head.
    """

    blocks: int
    hidden: int
    inner: int
    state: int
    rank: int
    conv: int = 4
    paths: int = 2
    patch_inputs: int = 768
    classes: int = 0


def scan_flops(dims: ScanDims, patches: int, lengths: Sequence[int]) -> int:
    """FLOPs of one image, given the tokens that every block sees. Dropped tokens cost nothing.

    Raises:
        ValueError: not one length per block.

    Example:
        >>> vim_tiny = ScanDims(24, 192, 384, 16, 12, classes=1000)
        >>> round(scan_flops(vim_tiny, 196, [197] * 24) / 2e9, 2)  # multiply-adds in 10^9
        1.47
    """
    _one_each("lengths", lengths, dims.blocks)
    E, S, R = dims.inner, dims.state, dims.rank
    path = 2 * E * dims.conv + 2 * E * (R + 2 * S) + 2 * R * E + 6 * E * S
    token = 2 * dims.hidden * 3 * E + dims.paths * path
    embedding = 2 * dims.patch_inputs * dims.hidden * patches
    return embedding + token * sum(lengths) + 2 * dims.hidden * dims.classes


@dataclass(frozen=True)
class ConvolutionDims:
    """An S4 decoder whose blocks halve length and width.

    Args:
        inputs: channels of the tokens.
        hidden: width of the first block.
        blocks: of the model.
        classes: of the head.
    """

    inputs: int
    hidden: int
    blocks: int
    classes: int = 0


def convolution_flops(
    dims: ConvolutionDims, tokens: int, lengths: Sequence[int], generator: bool = False
) -> int:
    """FLOPs of one video, given the tokens in every block; convolutions run at full length.

    The kernels are the same for all videos of a call and do not count.

    Args:
        dims: the model.
        tokens: L that enter.
        lengths: tokens in every block.
        generator: a mask generator has looked at all tokens.

    Raises:
        ValueError: not one length per block.

    Example:
        >>> dims = ConvolutionDims(1024, 1024, 3, 10)
        >>> full = convolution_flops(dims, 2048, [2048, 1024, 512])
        >>> half = convolution_flops(dims, 2048, [1024, 512, 256])
        >>> 0.5 < half / full < 0.6
        True
    """
    _one_each("lengths", lengths, dims.blocks)
    width, places = dims.hidden, tokens
    total = 2 * dims.inputs * width * tokens if dims.inputs != width else 0
    if generator:
        total += _transforms(width, places) + 4 * width * width * places + 4 * width * places
    for left in lengths:
        total += _transforms(width, places) + 4 * width * width * left
        total += width * width * (left // 2)
        width, places = width // 2, (places + 1) // 2
    return total + 2 * width * dims.classes


def _transforms(width: int, length: int) -> int:
    """A real Fourier transform of twice the length, the product with the kernel's, and back."""
    double = 2 * length
    return width * (2 * round(2.5 * double * log2(double)) + 6 * (length + 1))


def _one_each(name: str, values: Sequence[int], blocks: int) -> None:
    if len(values) != blocks:
        raise ValueError(f"{name} needs one number per block: {blocks}, got {len(values)}.")
