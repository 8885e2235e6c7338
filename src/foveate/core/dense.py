"""What a method predicts for every patch of an image while the encoder runs.

Legend: B images, K classes, P patches of an image, h x w of them, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from foveate.ops.early_exit import presence_scores


@dataclass(frozen=True, eq=False)
class DensePrediction:
    """A segmentation: one mask per class and image, put together from several depths.

    Attributes:
        method: who predicts.
        mask_logits_BKP: logits of every class's mask, as each patch left, float [B, K, P]; -inf at
            patches that never entered the encoder.
        class_logits_BK2: logits of (present, absent) of every class, of the last head.
        stage_BP: number of the head whose logits each patch has, int64 [B, P]; -1: none.
        plane: rows and columns of the patches, h x w = P.
        flops: what the heads cost, on top of the encoder, all images together.

    Example:
        >>> logits = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]])
        >>> stage = torch.zeros(1, 2, dtype=torch.long)
        >>> found = DensePrediction("dtop", logits, torch.zeros(1, 2, 2), stage, (1, 2))
        >>> found.classes().tolist(), found.classes((2, 4)).tolist()
        ([[[0, 1]]], [[[0, 0, 1, 1], [0, 0, 1, 1]]])
    """

    method: str
    mask_logits_BKP: torch.Tensor
    class_logits_BK2: torch.Tensor
    stage_BP: torch.Tensor
    plane: tuple[int, int]
    flops: int = 0

    def __post_init__(self) -> None:
        P = self.mask_logits_BKP.shape[2]
        if self.plane[0] * self.plane[1] != P:
            raise ValueError(f"A plane of {self.plane} does not hold the {P} patches predicted.")

    def scores(self, size: tuple[int, int] | None = None) -> torch.Tensor:
        """How much every place belongs to every class, in [0, 1], [B, K, h, w] or [B, K, H, W].

        Args:
            size: (H, W), bilinear between the patches; None: one value per patch.
        """
        score_BKP = presence_scores(self.mask_logits_BKP, self.class_logits_BK2)
        score_BKhw = score_BKP.unflatten(2, self.plane)
        if size is None:
            return score_BKhw
        return interpolate(score_BKhw, size=size, mode="bilinear", align_corners=False)

    def classes(self, size: tuple[int, int] | None = None) -> torch.Tensor:
        """The best class of every place, int64 [B, h, w] or [B, H, W]; `size` as in `scores`."""
        return self.scores(size).argmax(1)
