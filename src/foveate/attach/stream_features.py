"""Tokens of a few frames at a time, through a model's own feature method and a recipe.

Legend: T frames of a group, L tokens of them, N tokens of an item, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attach.attachment import Attachment
from foveate.attach.features import FeatureRecord
from foveate.attach.prompt import PromptReducer
from foveate.attach.sequence import VisualItem
from foveate.core import Budget, Grid, ItemReport, Modality, Recipe, Report, TokenKind
from foveate.errors import AttachmentError
from foveate.models.adapter import Adapter


class FrameFeatures:
    """Frames to tokens of the language model.

    Args:
        model: the model.
        adapter: its adapter.
        modality: as what its feature method takes frames.
        recipe: methods of the encoder and projector stages that shorten every group; None: none.
        budget: of the recipe.

    Attributes:
        closing_D: what this family puts behind the last frame of a video; None: nothing so far.
        place_L2: row and column of every token of the latest group in its frame, int64 [L, 2]; -1
            for newlines and [CLS] tokens.
        shape_T2: rows and columns of every frame of that group, int64 [T, 2].
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        modality: Modality,
        recipe: Recipe | None,
        budget: Budget | None,
    ) -> None:
        self.model, self.adapter = model, adapter
        self.modality: Modality = modality
        self.closing_D: Tensor | None = None
        self.place_L2 = self.shape_T2 = torch.empty(0, 2, dtype=torch.long)
        self.attachment: Attachment | None = None
        self._record: FeatureRecord | None = None
        if recipe is not None:
            self.attachment = Attachment(model, recipe, budget or Budget())

    def close(self) -> None:
        """Take the recipe's hooks off; calling it twice does no harm."""
        if self.attachment is not None:
            self.attachment.remove()
            self.attachment = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
        """Read a group of frames.

        Returns:
            Tokens frame by frame [L, D], the frame of each, ascending int64 [L], and T.
        """
        base: Any = self.adapter.base(self.model)
        like = next(base.parameters())
        given = {name: _placed(value, like) for name, value in inputs.items()}
        output = getattr(base, self.adapter.feature_methods[self.modality])(**given)
        features = getattr(output, "pooler_output", None)
        if features is None:
            features = output[1] if isinstance(output, tuple) and len(output) > 1 else output
        grids = self.adapter.grids(self.model, self.modality, given, features)
        parts = self.adapter.split_features(self.model, features, grids)
        found, planes, places, first = [], [], [], 0
        for number, (grid, x_ND) in enumerate(zip(grids, parts, strict=True)):
            x_ND, position_N3 = self._item(number, grid, x_ND.to(like.dtype))
            found.append(x_ND)
            planes.append(position_N3[:, 0] + first)
            places.append(position_N3[:, 1:])
            first += len(grid.planes)
        plane_L, order_L = torch.cat(planes).sort(stable=True)
        self.place_L2 = torch.cat(places)[order_L]
        sizes = [(plane.height, plane.width) for grid in grids for plane in grid.planes]
        self.shape_T2 = torch.tensor(sizes, device=plane_L.device)
        return torch.cat(found)[order_L], plane_L, first

    def _item(self, number: int, grid: Grid, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """What the recipe leaves of one item, without what closes it, and where each was."""
        source_N = torch.arange(len(x_ND), device=x_ND.device)
        if self.attachment is not None:
            x_ND, source_N = self._reduced(self.attachment, number, grid, x_ND)
        closes_N = source_N >= grid.num_tokens - grid.newlines_at_end
        if closes_N.any():
            self.closing_D = x_ND[closes_N][-1]
        position_N3 = grid.positions(x_ND.device)[source_N]
        position_N3[grid.kinds(x_ND.device)[source_N] != TokenKind.PATCH, 1:] = -1
        return x_ND[~closes_N], position_N3[~closes_N]

    def _reduced(
        self, attachment: Attachment, number: int, grid: Grid, x_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One item behind the recipe's projector stage, and the token whose place each takes."""
        watch, recipe = attachment._watch, attachment.recipe
        assert watch is not None
        if number == 0:
            self._record = watch.take().get(self.modality)
        record, report = self._record, ItemReport(0, self.modality, grid)
        item = VisualItem(
            0, self.modality, grid, torch.arange(len(x_ND), device=x_ND.device), {}, report
        )
        if record is not None:
            item.signals.update({name: parts[number] for name, parts in record.signals.items()})
            item.encoder = record.item(number)
            item.from_encoder.update({k: parts[number] for k, parts in record.carried.items()})
            pixels = record.pixels
            report.pixels = None if pixels is None else lambda: pixels()[number]
        reducer = PromptReducer(
            [(i, recipe.steps[i].method) for i in recipe.at("projector")],
            lambda step, sample: attachment._budgets[step].sample(sample),
            compact=False,
            seed=0,
            report=Report(),
            text_ids=None,
            stages={i: step.stages for i, step in enumerate(recipe)},
        )
        tokens = reducer.reduce_item([item], 0, x_ND[None], lambda name: None)
        if tokens.reduction is None:
            return x_ND, item.rows_N
        anchor_N = tokens.reduction.anchor_BM[0]
        if (anchor_N < 0).any():
            raise AttachmentError(
                f"{recipe} makes tokens that belong to no frame, which no stream can remember."
            )
        return tokens.x_BND[0], anchor_N


def _placed(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
