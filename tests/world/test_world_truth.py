"""Ground truth against pixels: what the masks say is what was drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.world import CLASSES, Scene, Shot, Sprite, Truth, World, render, sample_scene
from foveate.world.glyphs import text_alpha
from foveate.world.shapes import shape_alpha, texture_shade
from foveate.world.vocabulary import COLORS, DIGITS, SHAPES, TEXTURES, WORDS

PLAIN = Shot(0, 15, "textured", "truth/shot")


def sprite(**facts: object) -> Sprite:
    values: dict = {"id": 1, "kind": "shape", "role": "still", "radius": 0.2, "first": 0}
    values |= {"last": 15, "rgb": (240, 30, 30), "shape": "star", "color": "red", "size": "big"}
    values |= {"start": (0.5, 0.5), "end": (0.5, 0.5)} | facts
    return Sprite(**values)


def scene(*sprites: Sprite, shots: tuple[Shot, ...] = (PLAIN,), noise: int = 0) -> Scene:
    return Scene("truth", shots[-1].last + 1, sprites, shots, noise)


def drawn(*sprites: Sprite, size: tuple[int, int] = (64, 64)) -> tuple[np.ndarray, Truth]:
    made = scene(*sprites)
    pixels_THWC, masks_THW = render(made, *size)
    return pixels_THWC, Truth(made, masks_THW)


LOOKS = [
    *({"shape": shape} for shape in SHAPES),
    {"kind": "speck", "shape": "", "color": ""},
    {"kind": "sign", "text": "web", "shape": "", "color": "", "radius": 0.1},
]


# -- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look["shape"] or look["kind"])
@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_a_mask_is_what_the_sprite_covers_by_half(look: dict, size: tuple[int, int]) -> None:
    path = {"start": (0.3, 0.35), "end": (0.7, 0.6), "sway": 0.03}
    one = sprite(**path, **look)
    pixels_THWC, truth = drawn(one, size=size)
    empty_THWC, nothing_THW = render(scene(), *size)
    assert not nothing_THW.any()
    changed_THW = (pixels_THWC != empty_THWC).any(-1)
    if one.kind == "sign":  # a plate covers whole pixels
        np.testing.assert_array_equal(truth.masks_THW > 0, changed_THW)
        return
    # Red lies far above every background here, so its share gives the coverage back.
    under, over = empty_THWC[..., 0].astype(float), pixels_THWC[..., 0].astype(float)
    cover_THW = (over - under) / (one.rgb[0] - under)
    clear_THW = np.abs(cover_THW - 0.5) > 0.02
    assert clear_THW.mean() > 0.97
    np.testing.assert_array_equal((truth.masks_THW == 1)[clear_THW], (cover_THW > 0.5)[clear_THW])
    assert (truth.areas_TK > 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(32, 32), (40, 72), (64, 48)]))
def test_boxes_and_areas_are_tight(index: int, size: tuple[int, int]) -> None:
    made = sample_scene(f"boxes/{index}", 8)
    _, masks_THW = render(made, *size)
    truth = Truth(made, masks_THW)
    assert truth.boxes_TK4.shape == (8, len(made.sprites), 4)
    for frame in range(8):
        for slot, identity in enumerate(truth.ids):
            rows, columns = np.nonzero(masks_THW[frame] == identity)
            assert truth.areas_TK[frame, slot] == len(rows)
            expected = [-1] * 4
            if len(rows):
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert truth.boxes_TK4[frame, slot].tolist() == expected
            if not made.sprites[slot].present(frame):
                assert not len(rows) and not truth.present_TK[frame, slot]


def test_higher_depth_hides_lower_and_equal_depth_goes_by_order() -> None:
    behind = sprite(shape="square", depth=0.2)
    front = sprite(id=2, shape="circle", rgb=(20, 20, 240), radius=0.1, depth=0.7)
    pixels_THWC, truth = drawn(behind, front)
    assert truth.masks_THW[0, 32, 32] == 2
    assert pixels_THWC[0, 32, 32].tolist() == [20, 20, 240]
    swapped, swapped_truth = drawn(behind, replace(front, depth=0.1))
    assert swapped_truth.masks_THW[0, 32, 32] == 1
    assert swapped[0, 32, 32].tolist() == [240, 30, 30]
    assert swapped_truth.areas_TK[0].tolist()[1] == 0  # wholly hidden, though in the scene
    assert swapped_truth.present_TK[0].all()
    _, tied = drawn(behind, replace(front, depth=0.2))
    assert tied.masks_THW[0, 32, 32] == 2


def test_a_sprite_is_drawn_only_while_it_is_present() -> None:
    pixels_THWC, truth = drawn(sprite(first=5, last=9))
    assert np.flatnonzero(truth.areas_TK[:, 0]).tolist() == [5, 6, 7, 8, 9]
    assert truth.present_TK[:, 0].tolist() == [5 <= frame <= 9 for frame in range(16)]
    empty_THWC, _ = render(scene(), 64, 64)
    same_T = (pixels_THWC == empty_THWC).all((1, 2, 3))
    assert same_T.tolist() == [not 5 <= frame <= 9 for frame in range(16)]


def test_what_leaves_the_frame_is_cut_off() -> None:
    _, truth = drawn(sprite(start=(-0.3, 0.5), end=(0.5, 0.5)))
    assert truth.areas_TK[0, 0] == 0 and (truth.boxes_TK4[0, 0] == -1).all()
    assert (np.diff(truth.areas_TK[:, 0]) >= 0).all()
    partly = int(np.flatnonzero(truth.areas_TK[:, 0])[0])
    assert truth.boxes_TK4[partly, 0, 0] == 0


# -- trajectories ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["circle", "square", "diamond", "cross", "ring"])
@pytest.mark.parametrize("size", [(64, 64), (80, 128)])
def test_trajectories_are_the_centroids_of_masks(shape: str, size: tuple[int, int]) -> None:
    # These shapes are symmetric about their centres.
    one = sprite(shape=shape, start=(0.3, 0.7), end=(0.7, 0.3), sway=0.05)
    _, truth = drawn(one, size=size)
    for frame, (x, y) in enumerate(truth.trajectory(1)):
        rows, columns = np.nonzero(truth.masks_THW[frame])
        assert abs(columns.mean() + 0.5 - x * size[1]) <= 1
        assert abs(rows.mean() + 0.5 - y * size[0]) <= 1


def test_trajectories_begin_and_end_where_they_should() -> None:
    one = sprite(start=(0.2, 0.4), end=(0.8, 0.5), sway=0.03, first=0, last=15)
    path = drawn(one)[1].trajectory(1)
    np.testing.assert_allclose(path[[0, -1]], [(0.2, 0.4), (0.8, 0.5)], atol=1e-12)
    assert np.isnan(drawn(replace(one, first=3))[1].trajectory(1)[:3]).all()
    with pytest.raises(ValueError, match="ids 1 to 1, got 2"):
        drawn(one)[1].trajectory(2)


def test_a_scene_of_nothing_has_empty_truth() -> None:
    _, truth = drawn()
    assert truth.ids == () and truth.areas_TK.shape == (16, 0)
    assert truth.boxes_TK4.shape == (16, 0, 4) and truth.centers_TK2.shape == (16, 0, 2)
    assert truth.present_TK.shape == (16, 0) and not truth.classes_THW.any()


# -- classes --------------------------------------------------------------------------------------


def test_classes_name_what_is_seen() -> None:
    seen = set()
    for index in range(12):
        sample = World(size=48).sample(index)
        classes_THW = sample.truth.classes_THW
        assert classes_THW.dtype == np.uint8
        for one in sample.scene.sprites:
            here = classes_THW[sample.masks_THW == one.id]
            name = one.shape if one.kind == "shape" else one.kind
            assert {CLASSES[number] for number in np.unique(here)} <= {name}
            seen.add(name)
        assert not classes_THW[sample.masks_THW == 0].any()
    assert seen == set(CLASSES) - {"background"} and len(CLASSES) == 11


# -- shots and the camera -------------------------------------------------------------------------


def test_cuts_are_where_the_background_changes() -> None:
    checked = 0
    for index in range(60):
        made = replace(sample_scene(f"cuts/{index}", 16, noise=0), sprites=())
        if not made.cuts:
            continue
        pixels_THWC, masks_THW = render(made, 48, 48)
        truth = Truth(made, masks_THW)
        levels = pixels_THWC.astype(int)
        still = [shot.still for shot in made.shots]
        assert truth.shot_T[list(truth.cuts)].tolist() == list(range(1, len(made.shots)))
        for frame in range(1, 16):
            difference = np.abs(levels[frame] - levels[frame - 1]).mean()
            if frame in truth.cuts:
                assert difference > 2, (index, frame)
            elif still[truth.shot_T[frame]]:
                assert difference == 0
                assert truth.static_T[frame]
            assert truth.static_T[frame] <= (difference == 0)
            checked += 1
    assert checked > 200


def test_a_pan_shifts_the_background_by_the_window() -> None:
    pan = Shot(0, 15, "textured", "truth/pan", ((0.1, 0.9), (0.8, 0.2)), room=1.5)
    made = scene(shots=(pan,))
    pixels_THWC, masks_THW = render(made, 64, 96)
    windows_T4 = Truth(made, masks_THW).windows_T4
    np.testing.assert_allclose(windows_T4[:, 2:] - windows_T4[:, :2], 1 / 1.5)
    corners = np.round(windows_T4[:, :2] * (144, 96)).astype(int)  # x and y on the canvas
    assert not Truth(made, masks_THW).static_T.any()
    for frame in range(1, 16):
        right, down = corners[frame] - corners[0]
        assert right >= 0 >= down and (right, down) != (0, 0)
        now, before = pixels_THWC[frame], pixels_THWC[0]
        shared = now[-down:, : 96 - right] if down else now[:, : 96 - right]
        np.testing.assert_array_equal(shared, before[: 64 + down, right:])


def test_a_zoom_shows_the_middle_of_the_first_frame_larger() -> None:
    zoom = Shot(0, 15, "textured", "truth/zoom", zoom=(1.0, 2.0))
    made = scene(shots=(zoom,))
    pixels_THWC, masks_THW = render(made, 64, 64)
    truth = Truth(made, masks_THW)
    np.testing.assert_allclose(truth.windows_T4[0], [0, 0, 1, 1])
    np.testing.assert_allclose(truth.windows_T4[-1], [0.25, 0.25, 0.75, 0.75])
    np.testing.assert_allclose(truth.camera_T3[:, 2], np.linspace(1, 2, 16))
    middle = pixels_THWC[0, 16:48, 16:48].astype(float)
    smaller = pixels_THWC[-1].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(middle - smaller).mean() < 4
    assert np.abs(pixels_THWC[0].reshape(32, 2, 32, 2, 3).mean((1, 3)) - smaller).mean() > 4


def test_static_stretches_differ_by_noise_only() -> None:
    noisy, _ = render(scene(sprite(), noise=5), 64, 64)
    clean, _ = render(scene(sprite()), 64, 64)
    extra = noisy.astype(int) - clean
    assert (clean == clean[0]).all() and extra.min() == 0 and extra.max() == 5
    assert all((extra[frame] != extra[frame + 1]).mean() > 0.5 for frame in range(15))


def test_noise_never_overflows() -> None:
    brightest = sprite(rgb=(247, 247, 247), radius=0.5, shape="square")
    noisy, _ = render(scene(brightest, noise=8), 32, 32)
    assert noisy.min(where=noisy > 0, initial=255) >= 10 and noisy[:, 16, 16].min() >= 247


def test_natural_backgrounds_are_real_pictures() -> None:
    pytest.importorskip("av")
    natural = World(natural=1.0, size=48).sample(0)
    drawn_ = World(natural=0.0, size=48).sample(0)
    assert {shot.background for shot in natural.scene.shots} == {"natural"}
    assert natural.scene.sprites == drawn_.scene.sprites
    np.testing.assert_array_equal(natural.masks_THW, drawn_.masks_THW)
    behind = natural.masks_THW[0] == 0
    assert (natural.frames_THWC[0] != drawn_.frames_THWC[0])[behind].mean() > 0.5


# -- everything can be told apart -----------------------------------------------------------------

SMALLEST = 14  # pixels: a big sprite at 56 pixels, or a digit at 64


def differences(images: dict[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """Summed differences of all pairs, in pixels that are wholly different."""
    names = list(images)
    return {
        (one, other): float(np.abs(images[one].astype(float) - images[other]).sum() / 255)
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    }


def test_shapes_differ_at_the_smallest_size() -> None:
    found = differences({shape: shape_alpha(shape, SMALLEST) for shape in SHAPES})
    assert min(found.values()) > 0.1 * SMALLEST**2, min(found, key=found.__getitem__)


def test_textures_differ_at_the_smallest_size() -> None:
    shades = {name: np.minimum(texture_shade(name, SMALLEST), 255) for name in TEXTURES}
    found = differences(shades)
    assert min(found.values()) > 0.05 * SMALLEST**2, min(found, key=found.__getitem__)


def test_texts_differ_at_the_smallest_size() -> None:
    for texts in (DIGITS, WORDS):
        found = differences({text: text_alpha(text, SMALLEST) for text in texts})
        assert min(found.values()) >= 7, min(found, key=found.__getitem__)


def test_colors_are_far_apart_and_far_from_backgrounds() -> None:
    levels = np.array(list(COLORS.values()), dtype=float)
    apart = np.linalg.norm(levels[:, None] - levels, axis=-1) + 999 * np.eye(len(levels))
    # Each channel of a drawn colour strays by up to 10.
    assert apart.min() > 4 * 10 * np.sqrt(3)
    for index in range(40):
        empty, _ = render(replace(sample_scene(f"dull/{index}", 4), sprites=()), 32, 32)
        nearest = np.linalg.norm(empty.reshape(-1, 1, 3) - levels, axis=-1).min()
        assert nearest > 40, index


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shape_alpha("blob", 9), "unknown shape 'blob'; choose one of circle"),
        (lambda: shape_alpha("star", 0), "at least 1 pixel, got 0"),
        (lambda: texture_shade("furry", 9), "unknown texture 'furry'; choose one of plain"),
        (lambda: text_alpha("a!", 9), "no glyph for \\['!'\\] in 'a!'"),
        (lambda: render(scene(), 15, 64), "at least 16 pixels high and wide, got 15x64"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
