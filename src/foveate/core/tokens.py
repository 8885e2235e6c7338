"""Visual tokens with everything that travels with them.

Legend: B batch, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from foveate.core.grid import Grid
from foveate.core.reduction import Reduction


@dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """Features plus the per-token state that every reduction permutes together.

    Args:
        x_BND: features [B, N, D].
        mask_BN: bool [B, N], False for padding; None when every token is valid.
        position_BN3: (time, row, column) [B, N, 3]; real-valued after a centroid was formed.
        size_BN: how many source tokens each token stands for, [B, N]; None means one each.
        kind_BN: `TokenKind` values, int64 [B, N].
        protected_BN: bool [B, N], tokens that no method may drop.
        extra: more per-token tensors [B, N, ...] by name (score history, scene id, ...).
        reduction: from the source tokens to these; None when these are the source tokens.

    Raises:
        ValueError: a tensor does not start with [B, N], or the reduction does not end there.

    Example:
        >>> import torch
        >>> tokens = Tokens(torch.randn(1, 6, 8), extra={"score": torch.arange(6.0)[None]})
        >>> kept = tokens.reduce(Reduction.select(torch.tensor([0, 2, 5]), num_in=6))
        >>> kept.num_tokens, kept.index_BN.tolist()
        (3, [[0, 2, 5]])
        >>> kept.extra["score"].tolist()
        [[0.0, 2.0, 5.0]]
    """

    x_BND: torch.Tensor
    mask_BN: torch.Tensor | None = None
    position_BN3: torch.Tensor | None = None
    size_BN: torch.Tensor | None = None
    kind_BN: torch.Tensor | None = None
    protected_BN: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        if self.x_BND.dim() != 3:
            raise ValueError(f"Tokens need features [B, N, D], got {tuple(self.x_BND.shape)}.")
        leading = self.x_BND.shape[:2]
        named = {
            "mask_BN": self.mask_BN,
            "position_BN3": self.position_BN3,
            "size_BN": self.size_BN,
            "kind_BN": self.kind_BN,
            "protected_BN": self.protected_BN,
            **self.extra,
        }
        for name, value in named.items():
            if value is not None and value.shape[:2] != leading:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; it must start with [B, N] = "
                    f"{tuple(leading)} like the features."
                )
        if self.reduction is not None and self.reduction.anchor_BM.shape != leading:
            raise ValueError(
                f"{self.reduction!r} does not lead to the {tuple(leading)} tokens of the features."
            )

    def __repr__(self) -> str:
        shape, dtype = tuple(self.x_BND.shape), str(self.x_BND.dtype).removeprefix("torch.")
        origin = "" if self.reduction is None else f", {self.reduction!r}"
        return f"Tokens({shape}, {dtype}{origin})"

    @classmethod
    def from_grid(cls, x_ND: torch.Tensor, grid: Grid) -> Tokens:
        """One visual item: features [N, D] or [1, N, D] laid out as `grid` says.

        Raises:
            ValueError: the features are not [N, D] or [1, N, D] with N = `grid.num_tokens`.

        Example:
            >>> Tokens.from_grid(torch.zeros(7, 2), Grid.video(2, 1, 3, newlines_at_end=1))
            Tokens((1, 7, 2), float32)
        """
        x_BND = x_ND[None] if x_ND.dim() == 2 else x_ND
        if x_BND.dim() != 3 or x_BND.shape[:2] != (1, grid.num_tokens):
            raise ValueError(
                f"The grid describes {grid.num_tokens} tokens of one item, so the features must be "
                f"[{grid.num_tokens}, D] or [1, {grid.num_tokens}, D]; they are "
                f"{tuple(x_ND.shape)}."
            )
        device = x_BND.device
        return cls(
            x_BND,
            position_BN3=grid.positions(device)[None],
            kind_BN=grid.kinds(device)[None],
        )

    @property
    def batch(self) -> int:
        """B."""
        return self.x_BND.shape[0]

    @property
    def num_tokens(self) -> int:
        """N, padding included."""
        return self.x_BND.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.x_BND.device

    @property
    def index_BN(self) -> torch.Tensor:
        """Index of every token among the source tokens, int64 [B, N]; -1 without provenance."""
        if self.reduction is None:
            order_N = torch.arange(self.num_tokens, device=self.device)
            return order_N.expand(self.batch, -1)
        return self.reduction.anchor_BM

    def reduce(self, reduction: Reduction) -> Tokens:
        """Apply a reduction to the features and to all per-token state.

        Positions, kinds and extras are read from each target's anchor (zero without one); sizes
        are summed; a target is protected when its anchor is, and valid when it exists and its
        anchor, if any, is valid.

        Raises:
            ValueError: the reduction does not start at these tokens.
        """
        if (reduction.batch, reduction.num_in) != (self.batch, self.num_tokens):
            raise ValueError(
                f"{reduction!r} does not start at these {self.batch} x {self.num_tokens} tokens."
            )
        if reduction.kind == "synthesise":
            assert reduction.features_BMD is not None
            x_BND = reduction.features_BMD
        else:
            x_BND = reduction.apply(self.x_BND)
        size_BN = self.size_BN
        if size_BN is None and reduction.kind != "select":
            size_BN = self.x_BND.new_ones(self.x_BND.shape[:2], dtype=torch.float32)

        def at_anchor(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else reduction.gather(x)

        return replace(
            self,
            x_BND=x_BND,
            mask_BN=self._mask_after(reduction),
            position_BN3=at_anchor(self.position_BN3),
            size_BN=None if size_BN is None else reduction.sizes(size_BN),
            kind_BN=at_anchor(self.kind_BN),
            protected_BN=at_anchor(self.protected_BN),
            extra={name: reduction.gather(value) for name, value in self.extra.items()},
            reduction=reduction if self.reduction is None else self.reduction.then(reduction),
        )

    def _mask_after(self, reduction: Reduction) -> torch.Tensor | None:
        if self.mask_BN is None:
            return reduction.mask_BM
        # A new token without provenance has no anchor that could be padding.
        valid_BM = reduction.gather(self.mask_BN, fill=True)
        return valid_BM if reduction.mask_BM is None else valid_BM & reduction.mask_BM
