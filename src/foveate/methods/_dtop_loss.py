"""The loss that Dynamic Token Pruning trains every one of its heads with.

Legend: B images, K classes, h and w of a mask, M masks of present classes, P pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

#: Weight of a class that is absent, in the loss of presence.
ABSENT = 0.1


def focal_loss(
    logits_MP: Tensor, target_MP: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss of every mask, mean over its pixels, [M].

    Example:
        >>> round(focal_loss(torch.zeros(1, 4), torch.ones(1, 4)).item(), 4)
        0.0433
    """
    right_MP = (logits_MP * (2 * target_MP - 1)).sigmoid()
    cost_MP = binary_cross_entropy_with_logits(logits_MP, target_MP, reduction="none")
    weight_MP = alpha * target_MP + (1 - alpha) * (1 - target_MP)
    return (weight_MP * cost_MP * (1 - right_MP) ** gamma).mean(1)


def dice_loss(logits_MP: Tensor, target_MP: Tensor) -> Tensor:
    """One minus the overlap of every mask, smoothed by 1, [M].

    Example:
        >>> dice_loss(torch.full((1, 4), 50.0), torch.ones(1, 4)).tolist()
        [0.0]
    """
    share_MP = logits_MP.sigmoid()
    both_M = 2 * (share_MP * target_MP).sum(1)
    return 1 - (both_M + 1) / (share_MP.sum(1) + target_MP.sum(1) + 1)


def segmentation_loss(
    mask_logits_BKhw: Tensor,
    class_logits_BK2: Tensor,
    label_BHW: Tensor,
    ignore: int = 255,
    mask_weight: float = 20.0,
    dice_weight: float = 1.0,
    class_weight: float = 1.0,
) -> Tensor:
    """Loss of one head: presence of classes, and the masks of those that are present.

    Every class has a query of its own, so nothing is matched. Masks are brought to the size of the
    labels; the loss of training is the sum over heads.

    Args:
        mask_logits_BKhw: the canvas behind a head, in rows and columns.
        class_logits_BK2: the head's logits of (present, absent).
        label_BHW: class of every pixel, integers.
        ignore: label of pixels that belong to no class.
        mask_weight: of the focal loss.
        dice_weight: of the dice loss.
        class_weight: of the loss of presence.

    Raises:
        ValueError: the shapes do not fit, or a label is no class.

    Example:
        >>> label = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> masks, classes = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2)
        >>> round(segmentation_loss(masks, classes, label).item(), 4)
        1.8895

    Source: arXiv 2308.01045, and its released code.
    """
    B, K = mask_logits_BKhw.shape[:2]
    if class_logits_BK2.shape != (B, K, 2) or label_BHW.shape[:1] != (B,) or label_BHW.dim() != 3:
        raise ValueError(
            f"Masks [B, K, h, w] = {tuple(mask_logits_BKhw.shape)} go with class logits [B, K, 2] "
            f"and labels [B, H, W], got {tuple(class_logits_BK2.shape)} and "
            f"{tuple(label_BHW.shape)}."
        )
    class_K = torch.arange(K, device=label_BHW.device)
    is_BKP = (label_BHW[:, None] == class_K[:, None, None]).flatten(2)
    known_BP = is_BKP.any(1) | (label_BHW.flatten(1) == ignore)
    if not bool(known_BP.all()):
        raise ValueError(f"Labels are 0..{K - 1}, or {ignore} for none; there are others.")
    present_BK = is_BKP.any(2)
    weight_2 = class_logits_BK2.new_tensor([1.0, ABSENT])
    loss = class_weight * cross_entropy(
        class_logits_BK2.flatten(0, 1), (~present_BK).long().flatten(), weight_2
    )
    size = label_BHW.shape[1:]
    full_BKHW = interpolate(mask_logits_BKhw, size=size, mode="bilinear", align_corners=False)
    logits_MP, target_MP = full_BKHW.flatten(2)[present_BK], is_BKP[present_BK].to(full_BKHW)
    num = max(len(logits_MP), 1)
    loss = loss + mask_weight * focal_loss(logits_MP, target_MP).sum() / num
    return loss + dice_weight * dice_loss(logits_MP, target_MP).sum() / num
