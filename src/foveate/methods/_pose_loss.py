"""The losses that HoT trains a 3D pose transformer with.

Legend: B sequences, F frames, J joints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: How much each of Human3.6M's 17 joints counts.
JOINT_WEIGHTS = (1, 1, 2.5, 2.5, 1, 2.5, 2.5, 1, 1, 1, 1.5, 1.5, 4, 4, 1.5, 4, 4)


def pose_loss(
    predicted_BFJ3: torch.Tensor,
    target_BFJ3: torch.Tensor,
    *,
    joint_weights: Sequence[float] | None = None,
    smoothness: float = 0.5,
    velocity: float = 2.0,
) -> torch.Tensor:
    """Weighted mean joint error + 0.5 * smoothness of the prediction + 2 * mean velocity error.

    Args:
        predicted_BFJ3: joints, at least two frames, the root where the target has it.
        target_BFJ3: of the same shape.
        joint_weights: one per joint; None: those of Human3.6M's 17 joints, or 1 for other bodies.
        smoothness: weight of the squared difference of neighbouring frames.
        velocity: weight of the error of that difference.

    Returns:
        A number with a gradient.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> still = torch.zeros(1, 4, 17, 3)
        >>> round(pose_loss(still + 1, still, joint_weights=[1] * 17).item(), 4)
        1.7321

    Source: HoT, released code (arXiv 2311.12028).
    """
    if predicted_BFJ3.shape != target_BFJ3.shape or predicted_BFJ3.dim() != 4:
        raise ValueError(
            "pose_loss takes two [B, F, J, 3] of one shape, got "
            f"{tuple(predicted_BFJ3.shape)} and {tuple(target_BFJ3.shape)}."
        )
    if predicted_BFJ3.shape[1] < 2:
        raise ValueError("pose_loss needs at least two frames to speak of velocity.")
    joints = predicted_BFJ3.shape[2]
    if joint_weights is None:
        joint_weights = JOINT_WEIGHTS if joints == len(JOINT_WEIGHTS) else [1.0] * joints
    if len(joint_weights) != joints:
        raise ValueError(f"There are {joints} joints and {len(joint_weights)} weights.")
    weight_J = predicted_BFJ3.new_tensor(list(joint_weights))
    error = (weight_J * (predicted_BFJ3 - target_BFJ3).norm(dim=-1)).mean()
    step, true_step = predicted_BFJ3.diff(dim=1), target_BFJ3.diff(dim=1)
    rough = (weight_J[:, None] * step.square()).mean()
    speed = (step - true_step).norm(dim=-1).mean()
    return error + smoothness * rough + velocity * speed
