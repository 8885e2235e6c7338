"""The attention of one encoder block as a method reads it, and what is summed up from it.

Nothing here stores an N x N matrix for all heads: columns are summed chunk by chunk, rows are made
for the queries that are asked for.

Legend: I images of one item (frames, tiles; one for a plain image), H heads, N patches of an image,
M tokens of an image present in the block (prefix included; fewer than N when an encoder stage has
shortened it), R queries, d head channels, C channels of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

from foveate import ops
from foveate.core.reduction import Reduction
from foveate.errors import MissingSignalError

Which = Literal["patches", "all"]


@dataclass(frozen=True, eq=False)
class EncoderAttentionView:
    """Queries and keys of one encoder block for the images of one item, from which maps are made.

    Maps are float32 [I, N], one number per patch in the encoder's own order (rows of a plain image;
    the packed order of Qwen-VL); `to_tokens` carries them to the tokens of the language model.
    Where an encoder-stage method has merged tokens before this block, a map gives every patch the
    share of one of the patches that its token stands for.

    Attributes:
        q_IHMd: queries as the block uses them (rotated), prefix tokens first, [I, H, M, d].
        k_IHMd: keys likewise.
        v_IHMd: values, when the method sets `reads_values`; else None.
        num_prefix: [CLS] and register tokens at the front.
        has_cls: the first of them is a [CLS] token.
        windows: boundaries among the patches of an image that attend only to each other,
            `(0, ..., N)`; None when all of them do.
        planes: the plane of the item's grid that each image belongs to: frames their own, of an
            any-resolution image the thumbnail 0 and all tiles 1.
        size_IM: how many patches each present token stands for, where attention weighs by it.
        reduction: from all tokens of an image to the present ones; None when all are present.
        token_map: takes a map to the language model's tokens; None: tokens are the patches.
        method: registry name, for error messages.

    Example:
        >>> q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
        >>> view = EncoderAttentionView(q, k, num_prefix=1, has_cls=True)
        >>> tuple(view.received().shape), tuple(view.to_tokens(view.cls()).shape)
        ((2, 9), (1, 18))
    """

    q_IHMd: torch.Tensor
    k_IHMd: torch.Tensor
    v_IHMd: torch.Tensor | None = None
    num_prefix: int = 0
    has_cls: bool = False
    windows: tuple[int, ...] | None = None
    planes: tuple[int, ...] = ()
    size_IM: torch.Tensor | None = None
    reduction: Reduction | None = None
    token_map: Callable[[torch.Tensor], torch.Tensor] | None = None
    method: str = ""

    @property
    def num_images(self) -> int:
        """I."""
        return self.q_IHMd.shape[0]

    @property
    def num_patches(self) -> int:
        """N, before anything was merged."""
        present = self.k_IHMd.shape[2] if self.reduction is None else self.reduction.num_in
        return present - self.num_prefix

    # -- maps -----------------------------------------------------------------------------------

    def received(self, queries: Which = "patches", keys: Which = "all") -> torch.Tensor:
        """Mean of the attention columns over heads and queries, float32 [I, N].

        O(H M^2 d) time, O(M) memory. With windows, queries outside a patch's window count as zero,
        as in the block-diagonal matrix.

        Args:
            queries: whose attention is averaged: that of the patches, or of prefix tokens too.
            keys: what the softmax runs over: "all" as in the block itself, or "patches" alone,
                which makes every map sum to 1.
        """
        for name, value in (("queries", queries), ("keys", keys)):
            if value not in get_args(Which):
                raise ValueError(f'{name} must be "patches" or "all", got {value!r}.')
        first_query = self.num_prefix if queries == "patches" else 0
        first_key = self.num_prefix if keys == "patches" else 0
        q_IHRd = self.q_IHMd[:, :, first_query:]
        if self.size_IM is None:
            return self._column_sums(q_IHRd, None, first_key) / q_IHRd.shape[2]
        # A merged query counts as often as it stands for patches.
        weight_IR = self.size_IM[:, first_query:].float()
        return self._column_sums(q_IHRd, weight_IR, first_key) / weight_IR.sum(1, keepdim=True)

    def mean_rows(self, mask_IN: torch.Tensor) -> torch.Tensor:
        """Mean of the attention rows of chosen patches over heads and rows, float32 [I, N].

        What the chosen patches look at together. O(H R M d) with R the most chosen in an image
        (O(H M^2 d) with windows).

        Args:
            mask_IN: bool [I, N], the chosen queries; an image without any gets zeros.

        Raises:
            ValueError: the mask is not bool [I, N].
        """
        if mask_IN.dtype != torch.bool or tuple(mask_IN.shape) != self._shape:
            raise ValueError(
                f"mean_rows takes a mask bool {list(self._shape)}, got {mask_IN.dtype} "
                f"{list(mask_IN.shape)}."
            )
        weight_IM = torch.nn.functional.pad(mask_IN.float(), (self.num_prefix, 0))
        if self.reduction is not None:
            weight_IM = self.reduction.sizes(weight_IM)
        total_I1 = weight_IM.sum(1, keepdim=True).clamp_min(1)
        q_IHRd = self.q_IHMd
        if self.windows is None:
            # Often few of many are chosen: only their rows are made.
            most = int((weight_IM > 0).sum(1).max())
            weight_IM, index_IR = (x[:, :most] for x in weight_IM.sort(dim=1, descending=True))
            q_IHRd = self._queries(index_IR)
        return self._column_sums(q_IHRd, weight_IM, 0) / total_I1

    def cls(self) -> torch.Tensor:
        """Attention of the [CLS] query to every patch, mean over heads: float32 [I, N]. O(H M d).

        Raises:
            MissingSignalError: the encoder has no [CLS] token.
        """
        if not self.has_cls:
            reason = "its encoder has no [CLS] token"
            raise MissingSignalError(self.method, ("encoder.cls_attention",), reason)
        rows_IH1M = ops.attention_rows(
            self.q_IHMd[:, :, :1], self.k_IHMd, attn_mask=self._size_bias(0)
        )
        return self._per_patch(rows_IH1M[:, :, 0].mean(dim=1), 0)

    def given(self) -> torch.Tensor:
        """Mean over patch keys of every patch's row, mean over heads: float32 [I, N].

        1 / N everywhere in encoders without prefix tokens, since rows sum to 1; elsewhere what a
        patch does not spend on the prefix. O(H M^2 d) time, O(M d) memory.
        """
        prefix, num = self.num_prefix, self.num_patches
        if prefix == 0:
            return torch.full(self._shape, 1 / num, device=self.q_IHMd.device)
        q_IHMd, k_IHMd = self.q_IHMd.float(), self.k_IHMd.float()
        # The fused kernels sum whatever the values hold: here 1 for patches and 0 for the prefix.
        is_patch_M = torch.ones(k_IHMd.shape[2], device=k_IHMd.device)
        is_patch_M[:prefix] = 0
        mass_IHMd = torch.nn.functional.scaled_dot_product_attention(
            q_IHMd,
            k_IHMd,
            is_patch_M[:, None].expand_as(k_IHMd).contiguous(),
            attn_mask=self._size_bias(0),
        )
        given_IM = mass_IHMd[..., 0].mean(1) / num
        return self._spread(given_IM[:, prefix:])

    def rows(self, index_R: torch.Tensor) -> torch.Tensor:
        """Attention rows of some patches, float32 [I, H, R, N]; the prefix took its share.

        O(H R M d) time, O(H R M) memory.

        Args:
            index_R: int64 [R] or [I, R], the queries, counted among the patches.
        """
        index_IR = index_R.to(self.q_IHMd.device).expand(self.num_images, -1) + self.num_prefix
        if self.reduction is not None:
            index_IR = self.reduction.groups_BN.gather(1, index_IR)
        gone_IR, index_IR = index_IR < 0, index_IR.clamp_min(0)
        mask = self._size_bias(0)
        if self.windows is not None:
            inner = torch.tensor(self.windows[1:-1], device=index_IR.device)
            window_N = torch.bucketize(
                torch.arange(self.num_patches, device=index_IR.device), inner, right=True
            )
            mask = (window_N[index_IR][..., None] == window_N)[:, None]
        rows_IHRM = ops.attention_rows(self._queries(index_IR), self.k_IHMd, attn_mask=mask)
        rows_IHRM = rows_IHRM.masked_fill(gone_IR[:, None, :, None], 0.0)
        return self._per_patch(rows_IHRM.permute(0, 3, 1, 2), 0).permute(0, 2, 3, 1)

    # -- to the language model ------------------------------------------------------------------

    def to_tokens(self, map_IN: torch.Tensor) -> torch.Tensor:
        """A map as the language model's tokens have it, float32 [1, N'] or [1, N', C].

        It goes the way of the features: pooling, 2 x 2 merge (means), tiles, unpadding, windows.
        Tokens without a patch (newlines, [CLS]) hold NaN. Costs one such passage per channel, or
        two in all where every token is one patch.

        Args:
            map_IN: numbers per patch, [I, N] or [I, N, C].

        Raises:
            ValueError: the map has another shape.
        """
        if tuple(map_IN.shape[:2]) != self._shape or map_IN.dim() > 3:
            raise ValueError(
                f"to_tokens takes a map of this block's patches, {list(self._shape)} (and "
                f"channels), got {list(map_IN.shape)}."
            )
        if map_IN.dim() == 3:
            source_N = self._sources() if map_IN.shape[2] > 2 else None
            if source_N is not None:
                map_1NC = map_IN.float().reshape(1, -1, map_IN.shape[2])[:, source_N.clamp(min=0)]
                return map_1NC.masked_fill((source_N < 0)[:, None], torch.nan)
            return torch.stack([self.to_tokens(channel) for channel in map_IN.unbind(-1)], dim=-1)
        map_IN = map_IN.float()
        return map_IN.reshape(1, -1) if self.token_map is None else self.token_map(map_IN)

    # -- parts ----------------------------------------------------------------------------------

    def joined(self) -> EncoderAttentionView:
        """This block with its heads joined into one of full width, for the same maps.

        Without rotary positions and norms of queries and keys, these are the raw outputs of the
        projections, bias included.

        Example:
            >>> q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
            >>> tuple(EncoderAttentionView(q, k).joined().k_IHMd.shape)
            (2, 1, 10, 24)
        """
        q_I1MC, k_I1MC = (x.transpose(1, 2).flatten(2)[:, None] for x in (self.q_IHMd, self.k_IHMd))
        return replace(self, q_IHMd=q_I1MC, k_IHMd=k_I1MC, v_IHMd=None)

    def patch_keys(self) -> torch.Tensor:
        """The keys of all patches, [I, H, N, d]; patches that were merged share one."""
        k_IHMd = self.k_IHMd
        if self.reduction is not None:
            k_IHMd = self.reduction.restore(k_IHMd.transpose(1, 2)).transpose(1, 2)
        return k_IHMd[:, :, self.num_prefix :]

    def values(self) -> torch.Tensor:
        """The values [I, H, M, d] of the tokens present in the block, prefix first.

        Raises:
            ValueError: the method did not declare that it reads values.
        """
        if self.v_IHMd is None:
            raise ValueError(
                f"{self.method or 'This method'} did not declare that it reads the encoder's "
                "values; set the class attribute reads_values = True."
            )
        return self.v_IHMd

    @classmethod
    def join(cls, views: Sequence[EncoderAttentionView]) -> EncoderAttentionView:
        """The images of several calls of one encoder as one view."""
        first = views[0]
        if len(views) == 1:
            return first

        def join(parts: list[Any]) -> Any:
            return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0]

        reduction = first.reduction
        if reduction is not None:
            reduction = type(reduction)(
                *(join([getattr(v.reduction, f.name) for v in views]) for f in fields(reduction))
            )
        return replace(
            first,
            q_IHMd=join([view.q_IHMd for view in views]),
            k_IHMd=join([view.k_IHMd for view in views]),
            v_IHMd=join([view.v_IHMd for view in views]),
            size_IM=join([view.size_IM for view in views]),
            planes=tuple(plane for view in views for plane in view.planes),
            reduction=reduction,
        )

    def images(self, start: int, stop: int) -> EncoderAttentionView:
        """The images `start` to `stop` (excluded) alone."""

        def part(value: torch.Tensor | None) -> Any:
            return None if value is None else value[start:stop]

        reduction = self.reduction
        if reduction is not None:
            tensors = {
                field.name: part(value)
                for field in fields(reduction)
                if isinstance(value := getattr(reduction, field.name), torch.Tensor)
            }
            reduction = replace(reduction, **tensors)
        return replace(
            self,
            q_IHMd=part(self.q_IHMd),
            k_IHMd=part(self.k_IHMd),
            v_IHMd=part(self.v_IHMd),
            size_IM=part(self.size_IM),
            planes=self.planes[start:stop],
            reduction=reduction,
        )

    def frames(self, start: int, num: int, length: int) -> EncoderAttentionView:
        """`num` frames of `length` patches each, from patch `start` on of a row that packs many."""

        def part(x_1HMd: torch.Tensor | None) -> Any:
            if x_1HMd is None:
                return None
            x_HMd = x_1HMd[0, :, start : start + num * length]
            return x_HMd.unflatten(1, (num, length)).transpose(0, 1)

        inner = [b - start for b in self.windows or () if start <= b <= start + length]
        return replace(
            self,
            q_IHMd=part(self.q_IHMd),
            k_IHMd=part(self.k_IHMd),
            v_IHMd=part(self.v_IHMd),
            windows=tuple(inner) if len(inner) > 2 else None,
        )

    # -- helpers --------------------------------------------------------------------------------

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_images, self.num_patches

    def _sources(self) -> torch.Tensor | None:
        """The patch that every token is, int64 [N'], -1 for none; None where tokens mix patches."""
        place_P = torch.arange(self.num_images * self.num_patches, device=self.q_IHMd.device)
        # Numbers without order: a mean of them is hardly ever the number of the mean place.
        mixed_P = place_P * 7919 % 10007
        number_1N, mixed_1N = (
            self.to_tokens(x.view(self._shape)).to(place_P.device) for x in (place_P, mixed_P)
        )
        empty_N = number_1N[0].isnan()
        source_N = number_1N[0].nan_to_num().round().long()
        equal_N = (number_1N[0] == source_N) & (mixed_1N[0] == mixed_P[source_N])
        return source_N.where(~empty_N, -1) if bool((equal_N | empty_N).all()) else None

    def _queries(self, index_IR: torch.Tensor) -> torch.Tensor:
        index_IHRd = index_IR[:, None, :, None].expand(
            -1, self.q_IHMd.shape[1], -1, self.q_IHMd.shape[3]
        )
        return self.q_IHMd.gather(2, index_IHRd)

    def _size_bias(self, first_key: int) -> torch.Tensor | None:
        """What the block adds to its logits where merged tokens weigh more, [I, 1, 1, M]."""
        if self.size_IM is None:
            return None
        return self.size_IM[:, first_key:].float().log()[:, None, None]

    def _column_sums(
        self, q_IHRd: torch.Tensor, weight_IR: torch.Tensor | None, first_key: int
    ) -> torch.Tensor:
        """Weighted sums of attention columns, mean over heads, per patch: float32 [I, N]."""
        if self.windows is not None:
            return self._window_sums(weight_IR)
        sum_IM = ops.attention_column_sums(
            q_IHRd,
            self.k_IHMd[:, :, first_key:],
            row_weights=weight_IR,
            attn_mask=self._size_bias(first_key),
        )
        return self._per_patch(sum_IM.float(), first_key)

    def _window_sums(self, weight_IN: torch.Tensor | None) -> torch.Tensor:
        assert self.windows is not None
        sum_IN = torch.zeros(self._shape, device=self.q_IHMd.device)
        spans = list(pairwise(self.windows))
        for length in sorted({stop - start for start, stop in spans}):
            first_W1 = torch.tensor([[a] for a, b in spans if b - a == length])
            index_Wn = (first_W1 + torch.arange(length)).to(sum_IN.device)
            q_VHnd, k_VHnd = (
                x[:, :, index_Wn].transpose(1, 2).flatten(0, 1) for x in (self.q_IHMd, self.k_IHMd)
            )
            weight_Vn = None if weight_IN is None else weight_IN[:, index_Wn].flatten(0, 1)
            part_Vn = ops.attention_column_sums(q_VHnd, k_VHnd, row_weights=weight_Vn)
            sum_IN[:, index_Wn.flatten()] = part_Vn.float().view(self.num_images, -1)
        return sum_IN

    def _per_patch(self, value_IM: torch.Tensor, first: int) -> torch.Tensor:
        """Numbers of the tokens from `first` on as shares of every patch, [I, M, ...] -> [I, N]."""
        value_IM = value_IM[:, self.num_prefix - first :]
        if self.size_IM is not None:
            size_IM = self.size_IM[:, self.num_prefix :]
            value_IM = value_IM / size_IM.view(*size_IM.shape, *[1] * (value_IM.dim() - 2))
        return self._spread(value_IM)

    def _spread(self, value_IM: torch.Tensor) -> torch.Tensor:
        """Numbers of the present patches for all patches; those that were dropped get zero."""
        if self.reduction is None:
            return value_IM
        prefix_IM = value_IM.new_zeros(self.num_images, self.num_prefix, *value_IM.shape[2:])
        restored_IM = self.reduction.restore(torch.cat([prefix_IM, value_IM], dim=1))
        return restored_IM[:, self.num_prefix :]
