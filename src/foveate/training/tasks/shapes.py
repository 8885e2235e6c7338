"""The task `shapes`: one ViT that classifies and segments pictures, and what methods keep of it.

Stages: the trunk on parts of pictures, which are cheap, then on whole ones, for both tasks at once;
dtop's heads on the frozen trunk; a copy of the trunk as stvit runs it, with a block that recovers
the picture from its semantic tokens; a copy that says how much of a mosaic each texture covers; and
two copies with dtop's heads, one trained with patches leaving, one alike with all of them.

Legend: B pictures, P patches, K classes, h and w rows and columns of patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from foveate.methods.dtop import segmentation_loss
from foveate.training.loop import Tell
from foveate.training.sizes import Stage
from foveate.training.task import Outcome, Task, TaskSize, numbers_of
from foveate.training.tasks.shapes_data import draw_mosaics, draw_pictures
from foveate.training.tasks.shapes_measure import all_rows
from foveate.training.tasks.shapes_model import (
    EARLY,
    PLANE,
    build_networks,
    depths,
    exit_run,
    semantic_run,
)

#: What a stage trains.
_TRAINED = {
    "parts": ("trunk", "classify", "segment", "early"),
    "whole": ("trunk", "classify", "segment", "early"),
    "masks": ("masks",),
    "semantic": ("semantic", "semantic_classify", "semantic_segment", "centres", "recover"),
    "mosaics": ("mosaic", "mosaic_classify", "mosaic_segment"),
    "exits": ("exits", "exits_masks"),
    "dense": ("dense", "dense_masks"),
}
#: What begins as a copy of what; below, the factors on the learning rates of copied trunks.
_COPIES = {
    "semantic": {
        "semantic": "trunk",
        "semantic_classify": "classify",
        "semantic_segment": "segment",
    },
    "mosaics": {"mosaic": "trunk", "mosaic_segment": "segment"},
    "exits": {"exits": "trunk", "exits_masks": "masks"},
    "dense": {"dense": "trunk", "dense_masks": "masks"},
}
_FACTORS = {"semantic": 0.5, "mosaic": 1.0, "exits": 0.3, "dense": 0.3}
#: Score above which patches leave in the stages of dtop: the published one, and none.
_TAUS = {"exits": 0.9, "dense": 1.0}
#: Side of a part, in patches.
_WINDOW = 7
#: Weight of the losses of patches behind earlier blocks.
_EARLY_WEIGHT = 0.5


class Shapes(Task):
    """A ViT on pictures of shapes, for classification and segmentation.

    Example:
        >>> task = Shapes("tiny")
        >>> {name: tuple(x.shape) for name, x in task.batch("parts", 0).items()}["pixels"]
        (4, 3, 28, 28)
    """

    name = "shapes"

    def __init__(self, size: TaskSize = "small", seed: int = 0) -> None:
        super().__init__(size, seed)
        if size == "tiny":
            self.stages = dict.fromkeys(_TRAINED, Stage(2, 4, 1e-3, 1))
        else:
            self.stages = {
                "parts": Stage(600, 32, 3e-3, 50, horizon=2200),
                "whole": Stage(550, 24, 2e-3, 20),
                "masks": Stage(500, 16, 4e-3, 20),
                "semantic": Stage(700, 24, 1.5e-3, 20),
                "mosaics": Stage(500, 24, 2e-3, 20),
                "exits": Stage(250, 16, 2e-3, 20),
                "dense": Stage(250, 16, 2e-3, 20),
            }

    def build(self) -> dict[str, nn.Module]:
        """Trunk, heads and the parts of methods."""
        if self.size == "tiny":
            return build_networks(width=32, layers=8, heads=2, mlp=64)
        return build_networks(width=64, layers=8, heads=2, mlp=256)

    def groups(self, stage: str, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, float]]:
        """The modules of the stage; fresh parts learn faster than a copied trunk."""
        return [(modules[name], _FACTORS.get(name, 1.0)) for name in _TRAINED[stage]]

    def begin(self, stage: str, modules: dict[str, nn.Module]) -> None:
        """Later networks begin as copies of the trunk, heads as copies of its heads."""
        for copy, name in _COPIES.get(stage, {}).items():
            modules[copy].load_state_dict(modules[name].state_dict())

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """Pictures, parts of them in the stage `parts`, or mosaics."""
        number = list(self.stages).index(stage)
        rng = numbers_of(self.seed, number, step)
        window = _WINDOW if stage == "parts" else None
        count = self.stages[stage].clips
        if stage == "mosaics":
            mosaics = draw_mosaics(rng, count)
            return {
                "pixels": torch.from_numpy(mosaics.pixels_B3SS),
                "shares": torch.from_numpy(mosaics.share_BT),
                "patches": torch.from_numpy(mosaics.patch_Bhw),
            }
        drawn = draw_pictures(rng, count, window=window)
        return {
            "pixels": torch.from_numpy(drawn.pixels_B3SS),
            "label": torch.from_numpy(drawn.label_B),
            "patches": torch.from_numpy(drawn.patch_Bhw),
            "corner": torch.from_numpy(drawn.corner_B2),
        }

    def loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of pictures and patches; the published loss for dtop's heads."""
        if stage == "masks":
            return self._mask_loss(modules, batch)
        if stage in _TAUS:
            return self._exit_loss(stage, modules, batch)
        # The backward pass of the fused kernel takes several times as long on a CPU in bfloat16.
        with sdpa_kernel(SDPBackend.MATH):
            return self._loss(stage, modules, batch)

    def _loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if stage == "mosaics":
            return _mosaic_loss(modules, batch)
        if stage == "semantic":
            cls_BC, patch_BPC = semantic_run(modules, batch["pixels"])
            label_BK = modules["semantic_classify"](cls_BC)
            return _joint(label_BK, modules["semantic_segment"](patch_BPC), batch)
        *early, _, last_BNC = depths(modules["trunk"], batch["pixels"], batch["corner"])
        label_BK = modules["classify"](last_BNC[:, 0])
        loss, facts = _joint(label_BK, modules["segment"](last_BNC[:, 1:]), batch)
        heads = modules["early"]
        assert isinstance(heads, nn.ModuleList)
        for head, x_BNC in zip(heads, early, strict=True):
            loss = loss + _EARLY_WEIGHT * _patch_loss(head(x_BNC[:, 1:]), batch["patches"])
        return loss, facts

    def _mask_loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The heads see every patch: which leave depends on a threshold chosen later."""
        with torch.no_grad():
            found = depths(modules["trunk"], batch["pixels"], batch["corner"])[: len(EARLY) + 1]
        loss, right, heads = torch.zeros(()), torch.zeros(()), modules["masks"]
        assert isinstance(heads, nn.ModuleList)
        for head, x_BNC in zip(heads, found, strict=True):
            logits_BKP, class_BK2 = head(x_BNC[:, 1:].float())
            mask_BKhw = logits_BKP.float().unflatten(2, PLANE)
            loss = loss + segmentation_loss(mask_BKhw, class_BK2.float(), batch["patches"])
            right = (logits_BKP.argmax(1) == batch["patches"].flatten(1)).float().mean()
        return loss, {"patches": right}

    def _exit_loss(
        self, stage: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Trunk and heads with patches leaving, as published, or with all of them."""
        heads = modules[f"{stage}_masks"]
        assert isinstance(heads, nn.ModuleList)
        with sdpa_kernel(SDPBackend.MATH):
            found = exit_run(modules[stage], list(heads), batch["pixels"], _TAUS[stage])
        loss, right = torch.zeros(()), torch.zeros(())
        for canvas_BKP, class_BK2 in found:
            mask_BKhw = canvas_BKP.float().unflatten(2, PLANE)
            loss = loss + segmentation_loss(mask_BKhw, class_BK2.float(), batch["patches"])
            right = (canvas_BKP.argmax(1) == batch["patches"].flatten(1)).float().mean()
        return loss, {"patches": right}

    def measure(self, modules: dict[str, nn.Module], tell: Tell) -> list[Outcome]:
        """The rows of `all_rows`, on 1024 held-out pictures."""
        count, retains, rounds = 1024, (0.8, 0.65, 0.5), 61
        if self.size == "tiny":
            count, retains, rounds = 8, (0.65,), 0
        return all_rows(modules, self.seed, count, retains, rounds, tell)


def _patch_loss(logits_BPK: Tensor, patch_Bhw: Tensor) -> Tensor:
    return cross_entropy(logits_BPK.float().flatten(0, 1), patch_Bhw.flatten())


def _mosaic_loss(
    modules: dict[str, nn.Module], batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the shares of textures, and of the patches'; the share of pictures that are right."""
    corner_B2 = batch["pixels"].new_zeros(len(batch["pixels"]), 2).long()
    *_, last_BNC = depths(modules["mosaic"], batch["pixels"], corner_B2)
    share_BT = modules["mosaic_classify"](last_BNC[:, 0]).float()
    loss = cross_entropy(share_BT, batch["shares"])
    patches = _patch_loss(modules["mosaic_segment"](last_BNC[:, 1:]), batch["patches"])
    right = (share_BT.argmax(1) == batch["shares"].argmax(1)).float().mean()
    return loss + patches, {"shares": loss, "majority": right}


def _joint(
    label_BK: Tensor, patch_BPK: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of both tasks, with the shares of pictures and of shapes' patches that are right."""
    label_loss = cross_entropy(label_BK.float(), batch["label"])
    patch_BP = batch["patches"].flatten(1)
    shapes_BP = patch_BP > 0
    right_BP = patch_BPK.argmax(2) == patch_BP
    facts = {
        "accuracy": (label_BK.argmax(1) == batch["label"]).float().mean(),
        "patches": right_BP[shapes_BP].float().mean(),
    }
    return label_loss + _patch_loss(patch_BPK, batch["patches"]), facts
