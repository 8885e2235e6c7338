"""Attention rules: what a method may change about who attends to whom in the language model.

Legend: S tokens of one sample as they enter the language model, N visual tokens among them,
P rows of position ids (1, or 3-4 with M-RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from foveate.core.context import Context


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """How the tokens of one sample attend, in every decoder layer and in every later step.

    Every field speaks of the S tokens that enter the language model; tokens that leave later take
    their part of the rule with them. What is None stays as the model has it.

    Args:
        visible_SS: bool [S, S], True where the row attends to the key. It replaces the causal
            order, so it says itself which rows see ahead; every row must see itself. Tokens of
            earlier turns stay visible, and tokens of later calls see all that is left.
        shift_S: int64 [S], how far the position id of each token moves down (up, if negative), in
            all rows of M-RoPE alike; two tokens may end up at the same id. Later tokens move with
            the last one.
        unrotated_S: bool [S], keys that every query sees without rotary distance: their logits are
            products of unrotated queries and keys.

    Raises:
        ValueError: wrong dtypes, shapes that differ, or a row that does not see itself.

    Example:
        >>> AttentionRule(unrotated_S=torch.tensor([False, True, True, False])).is_empty
        False
        >>> AttentionRule().is_empty
        True
    """

    visible_SS: torch.Tensor | None = None
    shift_S: torch.Tensor | None = None
    unrotated_S: torch.Tensor | None = None

    def __post_init__(self) -> None:
        wanted = (("visible_SS", 2, "bool"), ("shift_S", 1, "int64"), ("unrotated_S", 1, "bool"))
        sizes = set()
        for name, dims, dtype in wanted:
            value = getattr(self, name)
            if value is None:
                continue
            if value.dim() != dims or value.dtype != getattr(torch, dtype):
                raise ValueError(
                    f"{name} must be {dtype} [{', '.join('S' * dims)}], got {value.dtype} "
                    f"{tuple(value.shape)}."
                )
            sizes |= set(value.shape)
        if len(sizes) > 1:
            raise ValueError(f"The parts of an attention rule speak of {sorted(sizes)} tokens.")
        if self.visible_SS is not None and not bool(self.visible_SS.diagonal().all()):
            blind = int((~self.visible_SS.diagonal()).nonzero()[0])
            raise ValueError(f"visible_SS hides token {blind} from itself; every row sees itself.")

    @property
    def is_empty(self) -> bool:
        """Whether the rule changes nothing."""
        return self.visible_SS is None and self.shift_S is None and self.unrotated_S is None

    @property
    def num_tokens(self) -> int | None:
        """S, None when the rule is empty."""
        for value in (self.visible_SS, self.shift_S, self.unrotated_S):
            if value is not None:
                return value.shape[0]
        return None


@dataclass(eq=False)
class RuleContext(Context):
    """The prompt of one sample as it enters the language model, after the projector stage.

    Attributes:
        sample: which sample of the batch; rows that beam search adds count as their sample.
        num_layers: decoder layers.
        visual_N: positions of the visual tokens among the S, int64 [N].
        column_S: places of the tokens in the prompt before any reduction, padding not counted,
            int64 [S] (a token made of several stands at one of theirs).
        num_columns: tokens of the prompt before any reduction.
        position_PS: their position ids, int64 [P, S].
        window: positions that the language model is configured for.
    """

    sample: int = 0
    num_layers: int = 1
    visual_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    column_S: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    num_columns: int = 0
    position_PS: torch.Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.long))
    window: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample, S."""
        return self.column_S.shape[0]

    @property
    def is_visual_S(self) -> torch.Tensor:
        """Which tokens are visual, bool [S]."""
        flags_S = torch.zeros(self.num_tokens, dtype=torch.bool, device=self.column_S.device)
        return flags_S.index_fill(0, self.visual_N, True)

    @property
    def num_positions(self) -> int:
        """Positions that the sample reaches into: one more than the largest of any axis."""
        # With four rows, the first counts tokens and turns nothing.
        position_PS = self.position_PS[-3:]
        return int(position_PS.max()) + 1 if position_PS.numel() else 0
