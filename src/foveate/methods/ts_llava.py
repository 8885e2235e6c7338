"""TS-LLaVA: a collage of a few frames beside an even sample of the tokens of all frames.

Legend: T frames, C channels, H and W pixels, h and w pixels of a cell, r rows and c columns of the
collage, N tokens of an item, S sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import interpolate

from foveate.core import (
    Budget,
    Card,
    Count,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    with_newlines,
)

Order = Literal["sampled_first", "thumbnail_first"]
PROMPT = "The input shows key frames of one video, in the order of time."


def frame_indices(num_source: int, num_frames: int = 50) -> list[int]:
    """The frames in the middle of `num_frames` equal stretches of a clip, ascending.

    Raises:
        ValueError: fewer frames than one, or a clip without any.

    Example:
        >>> frame_indices(100, 4)
        [12, 37, 62, 86]

    Source: the released code of TS-LLaVA (arXiv 2411.11066).
    """
    if num_source < 1 or num_frames < 1:
        raise ValueError(f"needs at least 1 frame of at least 1, got {num_frames} of {num_source}.")
    gap = (num_source - 1) / num_frames
    return [(round(gap * i) + round(gap * (i + 1))) // 2 for i in range(num_frames)]


def sample_indices(
    num_tokens: int,
    num_sampled: int,
    device: torch.device | str | None = None,
    *,
    clamp: bool = False,
) -> torch.Tensor:
    """Evenly spaced positions from the first to the last, `round(linspace(0, N - 1, S))`.

    The line is made in float32 on the CPU and rounded half to even, as published: in float64 some
    positions of long clips differ by one, and so they may on other devices.

    Args:
        num_tokens: N, tokens of the whole clip.
        num_sampled: S.
        device: of the result.
        clamp: take all tokens when there are fewer than `num_sampled`, instead of raising.

    Returns:
        int64 [S], strictly increasing.

    Raises:
        ValueError: fewer tokens than are to be sampled, or none are to be.

    Example:
        >>> sample_indices(10, 4).tolist(), len(sample_indices(28800, 2880))
        ([0, 3, 6, 9], 2880)

    Source: TS-LLaVA, section 3 (arXiv 2411.11066).
    """
    if num_sampled < 1 or (num_sampled > num_tokens and not clamp):
        raise ValueError(
            f"cannot sample {num_sampled} of {num_tokens} tokens; ask for at least 1 and at most "
            "as many as there are, or pass clamp=True to take all."
        )
    line_S = torch.linspace(
        0, num_tokens - 1, min(num_sampled, num_tokens), dtype=torch.float32, device="cpu"
    )
    return line_S.round().long().clamp(0, num_tokens - 1).to(device)


def collage_shape(num_frames: int) -> tuple[int, int]:
    """Rows and columns of a collage: the factors closest to each other, rows >= columns.

    Example:
        >>> [collage_shape(n) for n in (1, 4, 6, 7, 8)]
        [(1, 1), (2, 2), (3, 2), (7, 1), (4, 2)]
    """
    columns = max(i for i in range(1, int(num_frames**0.5) + 1) if num_frames % i == 0)
    return num_frames // columns, columns


def thumbnail(
    frames_TCHW: torch.Tensor, num_frames: int = 6, height: int = 336, width: int = 336
) -> torch.Tensor:
    """A collage of evenly spaced frames in row-major order of time.

    Cells are `height // r` x `width // c` pixels; where that leaves a remainder the collage is
    smaller than asked for. Frames that shrink are averaged over areas, others interpolated.

    Args:
        frames_TCHW: frames of one clip, [T, C, H, W], uint8 or floating point (normalised or not).
        num_frames: frames in the collage, at most T; published: 4, 6 or 8.
        height, width: pixels of the collage.

    Returns:
        [C, height, width] of the same dtype.

    Raises:
        ValueError: wrong shape, more frames than there are, or cells without a pixel.

    Example:
        >>> thumbnail(torch.zeros(9, 3, 24, 24), 6, height=36, width=36).shape
        torch.Size([3, 36, 36])

    Source: TS-LLaVA, section 3, and its released code (arXiv 2411.11066).
    """
    if frames_TCHW.dim() != 4:
        raise ValueError(f"frames must be [T, C, H, W], got shape {tuple(frames_TCHW.shape)}.")
    T, C, H, W = frames_TCHW.shape
    if not 1 <= num_frames <= T:
        raise ValueError(f"a collage of {num_frames} frames cannot be made of a clip of {T}.")
    rows, columns = collage_shape(num_frames)
    h, w = height // rows, width // columns
    if min(h, w) < 1:
        raise ValueError(
            f"{rows} x {columns} frames do not fit into {height} x {width} pixels; make it larger."
        )
    chosen = frames_TCHW[sample_indices(T, num_frames, frames_TCHW.device)]
    if h < H or w < W:
        cells_TChw = interpolate(_as_float(chosen), size=(h, w), mode="area")
    else:
        cells_TChw = interpolate(
            _as_float(chosen), size=(h, w), mode="bilinear", align_corners=False
        )
    if not frames_TCHW.is_floating_point():
        cells_TChw = cells_TChw.round()
    # r c C h w to C, r h, c w
    grid = cells_TChw.view(rows, columns, C, h, w).permute(2, 0, 3, 1, 4)
    return grid.reshape(C, rows * h, columns * w).to(frames_TCHW.dtype)


def messages(
    frames_TCHW: torch.Tensor,
    question: str,
    *,
    num_frames: int = 50,
    num_thumbnail: int = 6,
    size: tuple[int, int] = (336, 336),
    order: Order = "sampled_first",
    as_images: bool = False,
    prompt: str = PROMPT,
) -> list[dict[str, Any]]:
    """The chat that shows a clip and its thumbnail, for `foveate.checkpoints.read_chat`.

    Args:
        frames_TCHW: all frames of the clip, uint8 [T, 3, H, W].
        question: in words.
        num_frames: frames shown, from the middle of equal stretches; shorter clips give all.
        num_thumbnail: frames in the thumbnail.
        size: (height, width) of the thumbnail, pixels: the encoder's.
        order: whether the frames or the thumbnail come first.
        as_images: for image LLMs: every frame is an image of its own. Reduce with
            `TSLLaVA(images_as_frames=...)` then, where the number is that of the frames shown.
        prompt: sentence before the question.

    Raises:
        ValueError: frames of another form, or fewer than `num_thumbnail`.

    Example:
        >>> clip = torch.zeros(9, 3, 24, 24, dtype=torch.uint8)
        >>> [part["type"] for part in messages(clip, "What happens?")[0]["content"]]
        ['video', 'image', 'text']
    """
    from PIL import Image

    if frames_TCHW.dim() != 4 or frames_TCHW.shape[1] != 3 or frames_TCHW.dtype != torch.uint8:
        raise ValueError(
            f"frames must be uint8 [T, 3, H, W], got {frames_TCHW.dtype} of shape "
            f"{tuple(frames_TCHW.shape)}."
        )
    if len(frames_TCHW) > num_frames:
        frames_TCHW = frames_TCHW[frame_indices(len(frames_TCHW), num_frames)]

    def picture(pixels_CHW: torch.Tensor) -> dict[str, Any]:
        return {
            "type": "image",
            "url": Image.fromarray(pixels_CHW.permute(1, 2, 0).cpu().numpy()),
        }

    shown: list[dict[str, Any]] = [{"type": "video", "url": frames_TCHW}]
    if as_images:
        shown = [picture(frame_CHW) for frame_CHW in frames_TCHW]
    collage = [picture(thumbnail(frames_TCHW, num_thumbnail, *size))]
    shown = shown + collage if order == "sampled_first" else collage + shown
    text = {"type": "text", "text": f"{prompt} {question}"}
    return [{"role": "user", "content": [*shown, text]}]


@dataclass(frozen=True)
class TSLLaVA(Method):
    """TS-LLaVA: keeps evenly spaced tokens of all frames, and a thumbnail whole.

    Videos are sampled, images pass untouched: `messages` puts the thumbnail into the prompt as an
    image. `retain` is the share of the frames' tokens; the thumbnail comes on top. O(N).

    Args:
        images_as_frames: for image LLMs: how many images of a sample are the frames of one clip;
            they are sampled as one. None: no image is.
        order: whether the frames or the thumbnail come first in the prompt, which tells them apart
            where both are images or `thumbnail` is "frame".
        thumbnail: "image", or "frame": the last (or first, by `order`) frame of every video is a
            thumbnail and stays whole.

    Raises:
        ValueError: a value is not of those above.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> TSLLaVA().count(Grid.video(50, 24, 24), Budget(retain=0.1))
        Count(tokens=2880, exact=True)

    Source: arXiv 2411.11066, section 3.
    """

    images_as_frames: int | None = None
    order: Order = "sampled_first"
    thumbnail: Literal["image", "frame"] = "image"

    card: ClassVar[Card] = Card(
        name="ts_llava",
        title="TS-LLaVA",
        paper="TS-LLaVA: Constructing Visual Tokens through Thumbnail-and-Sampling for "
        "Training-Free Video Large Language Models",
        arxiv="2411.11066",
        year=2024,
        url="https://github.com/tingyu215/TS-LLaVA",
        licence="Apache-2.0",
        stages=("projector",),
        kind="training-free",
        summary="Keeps evenly spaced tokens of all frames beside a collage of a few of them.",
        defaults={
            "LLaVA-v1.6-vicuna-7B, LLaVA-v1.6-34B": "50 frames of 576 tokens, 2880 sampled "
            "(retain 0.1), then a thumbnail of 6 frames (3 x 2, 576 tokens): 3456",
        },
        headline=(
            "State of the art among training-free video LLMs at publication; the 34B model beats "
            "GPT-4V on MVBench and is comparable to Video-LLaMA2-72B on MLVU (abstract)",
        ),
        notes=(
            "The method samples tokens. The thumbnail is made before the encoder: "
            "`foveate.methods.ts_llava.messages` puts it into the prompt as one more image; "
            "without it the method is the sampling alone.",
            "`retain` is the share of the frames' tokens, `tokens` their number; the thumbnail is "
            "never shortened and comes on top.",
            "The released default puts the thumbnail after the sampled tokens; "
            "order='thumbnail_first' puts it before.",
            "On models that pool frames the sample is taken after the pooling, at the same share.",
            "Sampled rows have no newline tokens and no [CLS]; newlines that close an item stay.",
            "Cells are resized from the frames themselves; the released code resizes frames to "
            "the encoder's size first.",
            "Not built: several thumbnails (the variants W, U and Z) and shuffled cells.",
        ),
        retain=0.1,
    )

    def __post_init__(self) -> None:
        if self.images_as_frames is not None and self.images_as_frames < 1:
            raise ValueError(
                f"images_as_frames must be at least 1 image (or None), got {self.images_as_frames}."
            )
        if self.order not in ("sampled_first", "thumbnail_first"):
            raise ValueError(
                f'order must be "sampled_first" or "thumbnail_first", got {self.order!r}.'
            )
        if self.thumbnail not in ("image", "frame"):
            raise ValueError(f'thumbnail must be "image" or "frame", got {self.thumbnail!r}.')

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Exact for videos; a bound for a frame that is an image, whose place in the clip counts.

        Images that are no frames keep all their tokens.
        """
        if budget.is_full or (grid.modality == "image" and self.images_as_frames is None):
            return Count(grid.num_tokens)
        if grid.modality == "image":
            # All of it where the image is a thumbnail; the grid does not tell.
            return Count(grid.num_tokens, exact=False)
        whole = self._whole(grid)
        patches = grid.num_patches - whole
        sampled = max(1, budget.count(patches)) if patches else 0
        return Count(whole + sampled + grid.newlines_at_end)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep this item's part of the sample.

        Raises:
            ValueError: the sample has fewer images than `images_as_frames`.
        """
        grid, item = context.grid, context.item
        if context.budget.is_full:
            return None
        clip = [item] if grid.modality == "video" else self._clip(context.grids)
        if item not in clip:
            return None
        layouts = {**dict(enumerate(context.grids)), item: grid}
        sizes = [layouts[i].num_patches - self._whole(layouts[i]) for i in clip]
        total, mine = sum(sizes), sizes[clip.index(item)]
        patch_P = grid.patch_index(tokens.device)
        kept_K = patch_P
        if mine:
            start = sum(sizes[: clip.index(item)])
            sampled_S = sample_indices(total, max(1, context.budget.count(total)), tokens.device)
            inside_S = sampled_S[(sampled_S >= start) & (sampled_S < start + mine)] - start
            whole = grid.num_patches - mine
            first = whole if self.order == "thumbnail_first" else 0
            thumbnail_K = patch_P[:first] if first else patch_P[mine:]
            sampled_K = patch_P[first : first + mine][inside_S]
            kept_K = torch.cat([sampled_K, thumbnail_K])
            context.note("sampled", True, "mark", at=sampled_K)
            context.note("thumbnail", True, "mark", at=thumbnail_K)
        return Reduction.select(with_newlines(kept_K, grid, "end"), tokens.num_tokens)

    def _clip(self, grids: tuple[Grid, ...]) -> list[int]:
        """Items that are frames of the clip, in order."""
        if self.images_as_frames is None:
            return []
        images, num = (
            [i for i, g in enumerate(grids) if g.modality == "image"],
            self.images_as_frames,
        )
        if len(images) < num:
            raise ValueError(
                f"ts_llava samples {num} images as frames, this sample has {len(images)}."
            )
        return images[:num] if self.order == "sampled_first" else images[-num:]

    def _whole(self, grid: Grid) -> int:
        """Patches of the plane that is a thumbnail."""
        if self.thumbnail == "image" or grid.modality == "image":
            return 0
        return grid.planes[-1 if self.order == "sampled_first" else 0].num_patches


def _as_float(frames: torch.Tensor) -> torch.Tensor:
    return frames if frames.is_floating_point() else frames.float()
