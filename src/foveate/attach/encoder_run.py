"""What is known of one forward call of an encoder while its sequence is shortened.

Legend: B images of the call, N tokens of one of them, P its patches, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.attach.packing import Packing
from foveate.core import (
    DensePrediction,
    EncoderContext,
    EncoderPoint,
    Evidence,
    Method,
    Reduction,
    Spread,
    Tokens,
)
from foveate.core.flops import EncoderDims, encoder_flops
from foveate.core.method import overrides


@dataclass(eq=False)
class EncoderRun:
    """One forward call of an encoder.

    Attributes:
        tokens: the sequence after the last reduction (features of that moment); None before any
            and after the call.
        reduction: from the encoder's tokens to the present ones, prefix included; None: untouched.
        lengths: tokens per image that the MLP of each block saw.
        attention_lengths: tokens per image that the attention of each block saw.
        state: scratch of each method.
        captured: queries, keys and, where a method reads them, values of the running block.
        stash: shortened stream and its MLP output, waiting for the end of the block.
        seconds: host time spent in methods.
        restored: the sequence has been brought back to full length.
        num_prefix: tokens in front of the patches.
        carried: by step number and name: what methods carried, [B, P], until the call is over.
        left_BNC: states in which dropped tokens left, at full length, where a method drops some.
        notes: what methods noted, values over all patches, [B, P].
        pixels: the pictures of the call until the patches stage has looked at them.
        entered: from the encoder's tokens to those that entered the first block; None: all.
        packing: how the present tokens share rows; None: every image has one of its own.
        plane: rows and columns of the patches of an image; None where pixels do not tell.
        rows: sequences that the attention of each block ran on.
        mlp_rows: likewise its MLP.
        dense: what a method predicted for every patch.
        outside: images, queries and keys of every reading of tokens outside the sequence.
        joined: images that a row holds, consecutive frames of one video.
        front: prefix tokens in front of the patches of a row.
        answered: methods were asked for the attention of the running block in its kernel's place.
    """

    num_images: int = 0
    num_tokens: int = 0
    tokens: Tokens | None = None
    reduction: Reduction | None = None
    lengths: list[int] = field(default_factory=list)
    attention_lengths: list[int] = field(default_factory=list)
    state: dict[int, dict[str, Any]] = field(default_factory=dict)
    captured: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
    stash: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    restored: bool = False
    num_prefix: int = 0
    carried: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    left_BNC: torch.Tensor | None = None
    notes: list[Evidence] = field(default_factory=list)
    pixels: torch.Tensor | None = None
    entered: Reduction | None = None
    packing: Packing | None = None
    plane: tuple[int, int] | None = None
    rows: list[int] = field(default_factory=list)
    mlp_rows: list[int] = field(default_factory=list)
    dense: DensePrediction | None = None
    outside: list[tuple[int, int, int]] = field(default_factory=list)
    joined: int = 1
    front: int = 0
    answered: bool = False

    def __post_init__(self) -> None:
        self.front = self.num_prefix

    def counts_before(self) -> tuple[int, ...]:
        """Tokens that entered the first block, by image, or by row where frames were joined."""
        if self.entered is not None:
            return tuple(self.entered.counts_B.tolist())
        return (self.num_tokens * self.joined,) * (self.num_images // self.joined)

    def counts(self) -> tuple[int, ...]:
        """Tokens behind the last reduction, by image, or by row where frames were joined."""
        if self.reduction is None:
            return (self.num_tokens,) * self.num_images
        if self.reduction.mask_BM is None:
            return (self.reduction.num_out,) * self.reduction.batch
        return tuple(self.reduction.counts_B.tolist())

    def tokens_in_blocks(self) -> list[int]:
        """Tokens of all images in front of every block, padding included."""
        return [n * rows for n, rows in zip(self.attention_lengths, self.rows, strict=True)]

    def flops(self, dims: EncoderDims) -> int:
        """What the call has cost, padding included, in FLOPs."""
        if {*self.rows, *self.mlp_rows} == {self.num_images}:
            attention, mlp, images = self.attention_lengths, self.lengths, self.num_images
        else:
            pairs = zip(self.attention_lengths, self.rows, strict=True)
            attention, images = [(length,) * rows for length, rows in pairs], 1
            pairs = zip(self.lengths, self.mlp_rows, strict=True)
            mlp = [length * rows for length, rows in pairs]
        patches = self.num_tokens * self.num_images // images
        flops = encoder_flops(dims, attention, images, mlp_lengths=mlp, num_patches=patches)
        for number, queries, keys in self.outside:
            # Queries meet these and, once more, those of the sequence.
            pairs = queries * (keys + queries)
            flops += number * (keys * dims.attention_linear // 2 + pairs * dims.attention_pair)
        return flops


class NoBranch(torch.Tensor):
    """Zeros in the place of a branch: added to a stream they give that itself, without a pass.

    Example:
        >>> stream = torch.randn(1, 3, 2)
        >>> (stream + 0.5 * torch.zeros(1, 1, 1).as_subclass(NoBranch)) is stream
        True
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(args) == 2 and not kwargs:
            name, (a, b) = func.__name__.strip("_"), args
            if name in ("add", "radd", "iadd"):
                stream = b if isinstance(a, cls) else a
                if isinstance(stream, torch.Tensor) and not isinstance(stream, cls):
                    return stream
            if name in ("mul", "rmul"):
                return a if isinstance(a, cls) else b
        return super().__torch_function__(func, types, args, kwargs or {})


def acts_at(method: Method, point: EncoderPoint) -> bool:
    """Whether a method's encoder stage is asked there."""
    points = method.encoder_point
    return point == points if isinstance(points, str) else point in points


def states_left(run: EncoderRun, tokens: Tokens) -> torch.Tensor:
    """Every token of the input in the latest state that it, or what it became part of, was in."""
    if tokens.reduction is None:
        return tokens.x_BND
    assert run.left_BNC is None or run.left_BNC.shape[1] == tokens.reduction.num_in
    latest_BNC = tokens.reduction.restore(tokens.x_BND)
    if run.left_BNC is None:
        return latest_BNC
    return latest_BNC.where((tokens.reduction.groups_BN >= 0)[..., None], run.left_BNC)


def loses_some(run: EncoderRun, reduction: Reduction) -> bool:
    """Whether tokens may leave without having fed any that stays, in states not known yet."""
    if run.left_BNC is None or not isinstance(reduction, Spread):
        return True
    return not bool((reduction.weight_BMR != 0).any(1).all())


def take_notes(run: EncoderRun, number: int, method: Method, context: EncoderContext) -> None:
    """Keep what a method has carried and predicted."""
    for name, value_BP in context.carried.items():
        run.carried[number, name] = checked_carry(run, method, name, value_BP)
    if context.predictions:
        run.dense = context.predictions[-1]


def restoring(steps: list[tuple[int, Method]]) -> list[tuple[int, Method]]:
    """The steps that bring a sequence back to full length themselves."""
    return [(number, method) for number, method in steps if overrides(method, "encoder_restore")]


def recovered(
    run: EncoderRun, method: Method, context: EncoderContext, x_BMD: torch.Tensor
) -> torch.Tensor | None:
    """The sequence at full length as a method makes it; None: it does not.

    Raises:
        ValueError: it has another form.
    """
    with torch.no_grad():
        found_BND = method.encoder_restore(x_BMD, context)
    if found_BND is None:
        return None
    expected = (run.num_images, run.num_tokens, x_BMD.shape[2])
    if tuple(found_BND.shape) != expected:
        raise ValueError(
            f"{method.name}: encoder_restore() returns {list(expected)}, got "
            f"{list(found_BND.shape)}."
        )
    return found_BND.to(x_BMD.dtype)


def checked_carry(
    run: EncoderRun, method: Method, name: str, value_BP: torch.Tensor
) -> torch.Tensor:
    """What a method carries to its projector stage, if it has one number per patch."""
    expected = run.num_images, run.num_tokens - run.num_prefix
    if tuple(value_BP.shape) != expected:
        raise ValueError(
            f"{method.name}: carry({name!r}, ...) in the encoder stage takes one number per patch "
            f"of every image, {list(expected)}, got {list(value_BP.shape)}."
        )
    return value_BP.detach().float()
