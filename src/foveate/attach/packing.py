"""Images of different length side by side in rows of one length, so that padding costs nothing.

Legend: B images, M tokens of the longest of them, R rows, W tokens of a row, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class Packing:
    """Where the tokens of a padded batch are among the rows that a block runs on.

    Attributes:
        place_BM: place of every token among the R x W of the rows, int64; -1: padding.
        image_RW: image that every place belongs to, int64; -1: empty.

    Example:
        >>> exists_BM = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
        >>> packing = Packing.of(exists_BM)
        >>> packing.image_RW.tolist()
        [[0, 0, 0], [2, 2, 1]]
        >>> x_BMD = torch.arange(9.0).view(3, 3, 1) * exists_BM[..., None]
        >>> torch.equal(packing.unpack(packing.pack(x_BMD)), x_BMD)
        True
    """

    place_BM: torch.Tensor
    image_RW: torch.Tensor
    bias: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, exists_BM: torch.Tensor) -> Packing:
        """Rows as long as the longest image, filled first-fit from the longest to the shortest.

        Args:
            exists_BM: bool, which tokens are no padding.
        """
        counts, width = exists_BM.sum(1).tolist(), max(1, int(exists_BM.sum(1).max()))
        room: list[int] = []
        starts = [0] * len(counts)
        for image in sorted(range(len(counts)), key=lambda i: -counts[i]):
            if not counts[image]:
                continue
            row = next((r for r, free in enumerate(room) if free >= counts[image]), len(room))
            if row == len(room):
                room.append(width)
            starts[image] = (row + 1) * width - room[row]
            room[row] -= counts[image]
        device = exists_BM.device
        start_B1 = torch.tensor(starts, device=device)[:, None]
        place_BM = (start_B1 + exists_BM.cumsum(1) - 1).where(exists_BM, -1)
        image_BM = torch.arange(len(counts), device=device)[:, None].expand_as(place_BM)
        image_P = torch.full((max(1, len(room)) * width,), -1, device=device)
        image_P[place_BM[exists_BM]] = image_BM[exists_BM]
        return cls(place_BM, image_P.view(-1, width))

    @property
    def num_rows(self) -> int:
        """R."""
        return self.image_RW.shape[0]

    def pack(self, x_BMD: torch.Tensor) -> torch.Tensor:
        """Tokens [B, M, ...] as rows [R, W, ...]; empty places are zero."""
        exists_BM = self.place_BM >= 0
        R, W = self.image_RW.shape
        out = x_BMD.new_zeros(R * W, *x_BMD.shape[2:])
        out[self.place_BM[exists_BM]] = x_BMD[exists_BM]
        return out.view(R, W, *x_BMD.shape[2:])

    def unpack(self, y_RWD: torch.Tensor) -> torch.Tensor:
        """Rows [R, W, ...] as tokens [B, M, ...]; padding is zero."""
        exists_BM = self.place_BM >= 0
        taken = y_RWD.flatten(0, 1)[self.place_BM.clamp_min(0)]
        return taken * exists_BM.view(*exists_BM.shape, *[1] * (taken.dim() - 2))

    def unpack_heads(self, y_RHWd: torch.Tensor) -> torch.Tensor:
        """The same of queries, keys or values, [R, H, W, d] -> [B, H, M, d]."""
        return self.unpack(y_RHWd.transpose(1, 2)).transpose(1, 2)

    def attention_bias(self, size_BM: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the logits, [R, 1, W, W]: images do not see each other.

        Args:
            size_BM: how many tokens each counts for.
            dtype: of the result.
        """
        if self.bias is None or self.bias.dtype != dtype:
            same_RWW = self.image_RW[:, :, None] == self.image_RW[:, None]
            # Empty places see each other: a row of logits without any would not be a number.
            log_RW = (
                self.pack(size_BM.float().clamp_min(1e-9)).log().masked_fill(self.image_RW < 0, 0.0)
            )
            bias_RWW = log_RW[:, None].masked_fill(~same_RWW, float("-inf"))
            self.bias = bias_RWW[:, None].to(dtype)
        return self.bias
