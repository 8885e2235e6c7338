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


def by_loop(scene: Scene, masks: np.ndarray, frames: list[int], cell: int) -> tuple:
    """The same labels, one cell at a time."""
    T, H, W = masks.shape
    sprites = {sprite.id: sprite for sprite in scene.sprites if sprite.kind != "speck"}
    kinds, colors, places = [], [], []
    for t in range(T):
        for y in range(H // cell):
            for x in range(W // cell):
                block = masks[t, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell]
                area = Counter(int(i) for i in block.flatten() if int(i) in sprites)
                most = max(area.values(), default=0)
                middle = ((x + 0.5) * cell / W, (y + 0.5) * cell / H)
                if most < cell * cell / 16:
                    kinds.append(0)
                    colors.append(-1)
                    places.append((0 - middle[0], 0 - middle[1]))
                    continue
                sprite = sprites[min(i for i, pixels in area.items() if pixels == most)]
                kinds.append(KINDS.index(sprite.shape or sprite.text))
                colors.append(list(COLORS).index(sprite.color) if sprite.color else -1)
                center = sprite.center(frames[t], scene.frames)
                places.append((center[0] - middle[0], center[1] - middle[1]))
    return tuple(
        np.array(part).reshape(T, -1, *part_shape(part)) for part in (kinds, colors, places)
    )


def part_shape(part: list) -> tuple[int, ...]:
    return np.shape(part[0])


@pytest.mark.parametrize("cell", [8, 16])
def test_labels_equal_a_loop_over_cells(cell: int) -> None:
    world = World(seed=4, split="train", frames=8, size=64)
    shown = set()
    for index in range(20):
        scene = world.sample(index).scene
        frames = [0, 3, 6]
        _, masks = render(scene, 64, 64, frames=frames)
        kinds, colors, places = dense_labels(scene, masks, frames, cell)
        expected = by_loop(scene, masks, frames, cell)
        np.testing.assert_array_equal(kinds, expected[0])
        np.testing.assert_array_equal(colors, expected[1])
        np.testing.assert_allclose(places, expected[2], atol=1e-6)
        assert kinds.dtype == colors.dtype == np.int64 and places.dtype == np.float32
        shown |= set(kinds.flatten().tolist())
    # The comparison saw many kinds: nothing, shapes, and signs with digits and words.
    texts = [KINDS.index(text) for text in (DIGITS[0], WORDS[0])]
    assert len(shown) > 9 and 0 in shown
    assert any(texts[0] <= kind < texts[1] for kind in shown) and max(shown) >= texts[1]


def test_labels_of_masks_made_by_hand() -> None:
    still = {"start": (0.25, 0.5), "end": (0.25, 0.5), "first": 0, "last": 3, "rgb": (1, 2, 3)}
    star = Sprite(1, "shape", "still", 0.1, **still, shape="star", color="red")
    speck = Sprite(2, "speck", "speck", 0.1, **still)
    sign = Sprite(3, "sign", "sign", 0.1, **still, text="7")
    scene = Scene("by hand", 4, (star, speck, sign), (Shot(0, 3, "textured", "s"),))
    masks = np.zeros((1, 8, 16), dtype=np.uint8)
    # Four cells of 8 x 8 in two columns would be one row here: two cells, 64 pixels each.
    masks[0, 0, :4] = 1  # four pixels: exactly a sixteenth
    masks[0, 1:, :8] = 2  # a speck covers the rest and does not count
    masks[0, 0, 8:11] = 1  # three pixels are too few
    kinds, colors, places = dense_labels(scene, masks, [2], 8)
    assert kinds.tolist() == [[KINDS.index("star"), 0]]
    assert colors.tolist() == [[list(COLORS).index("red"), -1]]
    np.testing.assert_allclose(places[0, 0], (0.25 - 0.25, 0.5 - 0.5), atol=1e-6)
    masks[0, :2, 8:] = 3  # now a sign, which has no colour, wins the second cell
    kinds, colors, places = dense_labels(scene, masks, [2], 8)
    assert kinds.tolist() == [[KINDS.index("star"), KINDS.index("7")]]
    assert colors.tolist() == [[list(COLORS).index("red"), -1]]
    np.testing.assert_allclose(places[0, 1], (0.25 - 0.75, 0.0), atol=1e-6)


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
    kind, color = 5, 2
    labels = {
        "kind": torch.tensor([[kind, 0]]),
        "color": torch.tensor([[color, -1]]),
        "place": torch.tensor([[[0.3, -0.1], [9.0, 9.0]]]),
    }
    with torch.no_grad():
        head.read.weight.zero_()
        head.read.bias.zero_()
        head.read.bias[kind] = 50.0
        head.read.bias[kinds + color] = 50.0
        head.read.bias[kinds + colors :] = torch.tensor([0.3, -0.1])
    loss, facts = head.loss(torch.randn(1, 2, 4), labels)
    # The empty cell is read wrong, at its small weight; the rest is perfect.
    assert {name: float(value) for name, value in facts.items()} == pytest.approx(
        {"kind": 1.0, "color": 1.0, "place": 0.0}, abs=1e-6
    )
    assert float(loss.detach()) == pytest.approx(50 * 0.05 / 1.05, rel=1e-4)
    labels["color"] = torch.full((1, 2), -1)
    labels["kind"] = torch.zeros(1, 2, dtype=torch.long)
    assert torch.isfinite(head.loss(torch.randn(1, 2, 4), labels)[0])
