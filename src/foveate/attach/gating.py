"""The patches stage: which patches of every image enter a vision encoder at all.

Legend: B images of a call, P patches of one of them, N its tokens (prefix included), M tokens that
enter, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from foveate import ops
from foveate.attach.encoder_run import EncoderRun, checked_carry
from foveate.attach.noting import patches_notebook
from foveate.attach.packing import Packing
from foveate.core import Budget, Grid, Method, PatchesContext, Reduction, Stage, Tokens
from foveate.errors import AttachmentError
from foveate.models.tower import VisionTower


@dataclass(frozen=True)
class GateSettings:
    """What an encoder's stage knows of the methods at its gates; see `EncoderStage`."""

    budget: Callable[[int], Budget]
    tower: VisionTower
    seed: int
    evidence: bool
    stages: Mapping[int, tuple[Stage, ...]]
    layouts: Callable[[], Sequence[tuple[Grid, int]]]


def pass_gates(
    run: EncoderRun,
    x_BND: torch.Tensor,
    gates: Sequence[tuple[int, Method]],
    settings: GateSettings,
    skip_empty: bool,
) -> torch.Tensor:
    """The patches stage: what enters the first block, in rows without padding.

    Args:
        run: the call, with its pixels.
        x_BND: all tokens of all images.
        gates: (step number, method) in order.
        settings: of the stage.
        skip_empty: images of which nothing enters lose their prefix, too.
    """
    assert run.pixels is not None
    begin, prefix = time.perf_counter(), settings.tower.num_prefix
    shape = (run.num_images, run.num_tokens - prefix)
    enters_BP = None
    for number, method in gates:
        if settings.budget(number).is_full:
            continue
        context = PatchesContext(
            settings.budget(number),
            method.name,
            settings.seed,
            notebook=patches_notebook(run.notes, shape) if settings.evidence else None,
            stages=settings.stages.get(number, ()),
            pixels_B3HW=run.pixels,
            patch_size=settings.tower.patch_size,
            num_prefix=prefix,
            layouts=settings.layouts,
        )
        found_BP = entering(method, context, shape[1])
        for name, value_BP in context.carried.items():
            run.carried[number, name] = checked_carry(run, method, name, value_BP)
        if found_BP is not None:
            enters_BP = found_BP if enters_BP is None else enters_BP & found_BP
    run.pixels = None
    if enters_BP is not None and not bool(enters_BP.all()):
        run.entered = gate(enters_BP, prefix, skip_empty)
        run.tokens = Tokens(x_BND).reduce(run.entered)
        run.reduction = run.tokens.reduction
        x_BND = run.tokens.x_BND
        pack(run)
        if run.packing is not None:
            x_BND = run.packing.pack(x_BND)
    run.seconds += time.perf_counter() - begin
    return x_BND


def pack(run: EncoderRun) -> None:
    """Let images share rows where they differ in length, if that makes fewer rows."""
    mask_BM = None if run.tokens is None else run.tokens.mask_BN
    run.packing = None if mask_BM is None else Packing.of(mask_BM)
    if run.packing is not None and run.entered is None and run.packing.num_rows == run.num_images:
        run.packing = None  # a mask of the padding does as well


def pixels_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The pictures that an encoder is called with, [B, 3, H, W].

    Raises:
        AttachmentError: there are none, or they have another form.
    """
    pixels = kwargs.get("pixel_values", args[0] if args else None)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4:
        shape = None if pixels is None else tuple(pixels.shape)
        raise AttachmentError(
            "The patches stage compares the pictures that enter the encoder, and expects them as "
            f"pixel_values [images, 3, height, width]; got {shape}."
        )
    return pixels


def plane_of(
    args: tuple, kwargs: dict[str, Any], patch_size: tuple[int, int]
) -> tuple[int, int] | None:
    """Rows and columns of the patches of the pictures that an encoder is called with."""
    pixels = kwargs.get("pixel_values", args[0] if args else None)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4:
        return None
    return pixels.shape[2] // patch_size[0], pixels.shape[3] // patch_size[1]


def entering(method: Method, context: PatchesContext, num_patches: int) -> torch.Tensor | None:
    """What a method lets in, bool [B, P]; None: everything.

    Raises:
        AttachmentError: the encoder has other patches than its pixels say.
        ValueError: the answer has another form, or keeps patches out for which no earlier frame of
            the clip has an output.
    """
    if context.num_patches != num_patches:
        raise AttachmentError(
            f"{method.name} counts {context.num_patches} patches of {context.patch_size} pixels in "
            f"pictures of {tuple(context.pixels_B3HW.shape[-2:])}, the encoder {num_patches}; it "
            "cannot tell which is which. Use a projector or decoder method."
        )
    with torch.no_grad():
        enters_BP = method.patches(context)
    if enters_BP is None:
        return None
    expected = (context.pixels_B3HW.shape[0], num_patches)
    if enters_BP.dtype != torch.bool or tuple(enters_BP.shape) != expected:
        raise ValueError(
            f"{method.name}: patches() returns bool {list(expected)}, got {enters_BP.dtype} "
            f"{list(enters_BP.shape)}."
        )
    if not bool(enters_BP[context.clip_starts()].all()):
        raise ValueError(
            f"{method.name}: the first frame of a clip enters whole; nothing precedes it that its "
            "missing patches could be filled from."
        )
    return enters_BP


def gate(enters_BP: torch.Tensor, prefix: int, skip_empty: bool) -> Reduction:
    """The tokens that enter, in order, ragged; prefix tokens of every image with them.

    Args:
        enters_BP: which patches do.
        prefix: tokens in front of the patches.
        skip_empty: images without any patch lose their prefix, too.
    """
    enters_BN = pad(enters_BP, (prefix, 0), value=True)
    if skip_empty:
        enters_BN = enters_BN & enters_BP.any(1, keepdim=True)
    count_B = enters_BN.sum(1)
    index_BM = (~enters_BN).byte().argsort(dim=1, stable=True)[:, : int(count_B.max())]
    slot_M = torch.arange(index_BM.shape[1], device=index_BM.device)
    exists_BM = slot_M < count_B[:, None]
    mask_BM = None if bool(exists_BM.all()) else exists_BM
    return Reduction.select(index_BM, enters_BN.shape[1], mask_BM)


def latest(entered: Reduction) -> torch.Tensor:
    """The image from which each token's output is taken, int64 [B, N]: the last that computed it.

    First frames of clips are whole, so no image reaches back into another clip.
    """
    return ops.last_true(entered.groups_BN >= 0)


def fill(y_BNC: torch.Tensor, image_BN: torch.Tensor) -> torch.Tensor:
    """Outputs at full length, every token from the image that `latest` names."""
    place_N = torch.arange(y_BNC.shape[1], device=y_BNC.device)
    return y_BNC[image_BN, place_N]


def bring_back(run: EncoderRun, y_BMC: torch.Tensor) -> torch.Tensor:
    """The sequence of an encoder at full length; what was dropped is zero, or as it left."""
    assert run.reduction is not None
    y_BNC = run.reduction.restore(y_BMC)
    if run.joined > 1:
        return y_BNC.reshape(run.num_images, run.num_tokens, -1)
    if run.left_BNC is not None:
        y_BNC = y_BNC.where((run.reduction.groups_BN >= 0)[..., None], run.left_BNC)
    return y_BNC if run.entered is None else fill(y_BNC, latest(run.entered))
