"""Labels of patches against a plain loop, on real scenes and on masks made by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from foveate.training import SIZES
from foveate.training.data import TowerBatches
from foveate.training.dense import KINDS, DenseHead, dense_labels
from foveate.world import Scene, Shot, Sprite, World, render
from foveate.world.vocabulary import COLORS, DIGITS, WORDS


def by_loop(scene: Scene, masks: np.ndarray, frames: list[int], cell: int) -> dict[str, np.ndarray]:
    """The same labels, one cell at a time."""
    T, H, W = masks.shape
    sprites = {sprite.id: sprite for sprite in scene.sprites if sprite.kind != "speck"}
    kinds, colors, places, centres = [], [], [], []
    for t in range(T):
        for top in range(0, H, cell):
            for left in range(0, W, cell):
                block = masks[t, top : top + cell, left : left + cell]
                area = Counter(int(i) for i in block.flatten() if int(i) in sprites)
                most = max(area.values(), default=0)
                kind, color, place = 0, -1, ((left + cell / 2) / W, (top + cell / 2) / H)
                if most >= cell * cell / 16:
                    sprite = sprites[min(i for i, pixels in area.items() if pixels == most)]
                    kind = KINDS.index(sprite.shape or sprite.text)
                    color = list(COLORS).index(sprite.color) if sprite.color else -1
                    place = sprite.center(frames[t], scene.frames)
                here = 0
                for sprite in sprites.values():
                    x, y = sprite.center(frames[t], scene.frames)
                    inside = left <= x * W < left + cell and top <= y * H < top + cell
                    here += inside and sprite.present(frames[t])
                kinds.append(kind)
                colors.append(color)
                places.append(place)
                centres.append(min(here, 3))
    names = ("kind", "color", "place", "centres")
    columns = (np.array(part) for part in (kinds, colors, places, centres))
    return {n: x.reshape(T, -1, *x.shape[1:]) for n, x in zip(names, columns, strict=True)}


@pytest.mark.parametrize("cell", [8, 16])
def test_labels_equal_a_loop_over_cells(cell: int) -> None:
    world = World(seed=4, split="train", frames=8, size=64)
    shown, counted = set(), set()
    for index in range(20):
        scene = world.sample(index).scene
        frames = [0, 3, 6]
        _, masks = render(scene, 64, 64, frames=frames)
        labels, expected = (
            dense_labels(scene, masks, frames, cell),
            by_loop(scene, masks, frames, cell),
        )
        assert labels.keys() == expected.keys()
        for name in ("kind", "color", "centres"):
            np.testing.assert_array_equal(labels[name], expected[name], err_msg=name)
            assert labels[name].dtype == np.int64
        np.testing.assert_allclose(labels["place"], expected["place"], atol=1e-6)
        assert labels["place"].dtype == np.float32
        shown |= set(labels["kind"].flatten().tolist())
        counted |= set(labels["centres"].flatten().tolist())
    # The comparison saw many kinds: nothing, shapes, and signs with digits and words.
    texts = [KINDS.index(text) for text in (DIGITS[0], WORDS[0])]
    assert len(shown) > 9 and 0 in shown
    assert any(texts[0] <= kind < texts[1] for kind in shown) and max(shown) >= texts[1]
    assert {0, 1} <= counted


def test_labels_of_masks_made_by_hand() -> None:
    still = {"start": (0.25, 0.5), "end": (0.25, 0.5), "first": 0, "last": 3, "rgb": (1, 2, 3)}
    star = Sprite(1, "shape", "still", 0.1, **still, shape="star", color="red")
    speck = Sprite(2, "speck", "speck", 0.1, **still)
    sign = Sprite(3, "sign", "sign", 0.1, **still, text="7")
    late = Sprite(4, "shape", "late", 0.1, **{**still, "first": 3}, shape="ring", color="blue")
    scene = Scene("by hand", 4, (star, speck, sign, late), (Shot(0, 3, "textured", "s"),))
    # Two cells of 64 pixels.
    masks = np.zeros((1, 8, 16), dtype=np.uint8)
    masks[0, 0, :4] = 1  # four pixels: exactly a sixteenth
    masks[0, 1:, :8] = 2  # a speck covers the rest and does not count
    masks[0, 0, 8:11] = 1  # three pixels are too few
    labels = dense_labels(scene, masks, [2], 8)
    assert labels["kind"].tolist() == [[KINDS.index("star"), 0]]
    assert labels["color"].tolist() == [[list(COLORS).index("red"), -1]]
    # Of the star in the first cell, of the cell itself in the second.
    np.testing.assert_allclose(labels["place"], [[(0.25, 0.5), (0.75, 0.5)]], atol=1e-6)
    # The star and the sign, not the speck and not what comes later.
    assert labels["centres"].tolist() == [[2, 0]]
    masks[0, :2, 8:] = 3  # now a sign, which has no colour, wins the second cell
    labels = dense_labels(scene, masks, [3], 8)
    assert labels["kind"].tolist() == [[KINDS.index("star"), KINDS.index("7")]]
    assert labels["color"].tolist() == [[list(COLORS).index("red"), -1]]
    np.testing.assert_allclose(labels["place"], [[(0.25, 0.5), (0.25, 0.5)]], atol=1e-6)
    assert labels["centres"].tolist() == [[3, 0]]


def test_batches_of_the_tower_fit_its_frames() -> None:
    size = SIZES["tiny"]
    data = TowerBatches(size, seed=0, first=3)
    batch = data[1]
    count = size.tower.clips * size.frames_per_clip
    side = size.image // size.patch
    assert batch["frames"].shape == (count, size.image, size.image, 3)
    assert batch["frames"].dtype == torch.uint8
    assert batch["patches"]["kind"].shape == (count, side * side)
    assert batch["tokens"]["kind"].shape == (count, size.tokens_per_frame)
    assert batch["tokens"]["place"].shape == (count, size.tokens_per_frame, 2)
    again = TowerBatches(size, seed=0, first=3)[1]
    assert torch.equal(batch["frames"], again["frames"])
    assert not torch.equal(batch["frames"], TowerBatches(size, seed=1, first=3)[1]["frames"])
    # Clip by clip, so that step 0 of a later start is step 1 of an earlier one.
    shifted = TowerBatches(size, seed=0, first=3 + size.tower.clips)[0]
    assert torch.equal(batch["patches"]["kind"], shifted["patches"]["kind"])


def test_the_head_scores_what_it_reads() -> None:
    head = DenseHead(4)
    kinds, colors = len(KINDS), len(COLORS)
    kind, color, centres = 5, 2, 1
    labels = {
        "kind": torch.tensor([[kind, 0]]),
        "color": torch.tensor([[color, -1]]),
        "place": torch.tensor([[[0.3, 0.1], [0.8, 0.6]]]),
        "centres": torch.tensor([[centres, 0]]),
    }
    with torch.no_grad():
        head.read.weight.zero_()
        head.read.bias.zero_()
        head.read.bias[kind] = 50.0
        head.read.bias[kinds + color] = 50.0
        head.read.bias[kinds + colors :][:2] = torch.tensor([0.3, 0.1])
        head.read.bias[kinds + colors + 2 + centres] = 50.0
    loss, facts = head.loss(torch.randn(1, 2, 4), labels)
    # The empty cell is read wrong everywhere, at its small weight; the rest is perfect.
    assert {name: float(value) for name, value in facts.items()} == pytest.approx(
        {"kind": 1.0, "color": 1.0, "place": 0.0, "centres": 0.5}, abs=1e-6
    )
    far = 2 * (0.5 - 0.01)  # smooth L1 with a beta of 0.02, both coordinates
    assert float(loss.detach()) == pytest.approx((50 + 50 + 8 * far) * 0.05 / 1.05, rel=1e-4)
    # Frames with nothing in them.
    labels["color"] = torch.full((1, 2), -1)
    labels["kind"] = labels["centres"] = torch.zeros(1, 2, dtype=torch.long)
    assert torch.isfinite(head.loss(torch.randn(1, 2, 4), labels)[0])
