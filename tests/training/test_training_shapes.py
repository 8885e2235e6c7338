"""The task `shapes`: what its pictures show, and that its networks run as methods attach them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import foveate
from foveate.training import make_task
from foveate.training.tasks.shapes_bench import HeldOut, Pass, mean_iou, times
from foveate.training.tasks.shapes_data import (
    COLOURS,
    NUM_CLASSES,
    PATCH,
    SIDE,
    TEXTURES,
    Mosaics,
    Pictures,
    draw_mosaics,
    draw_pictures,
)
from foveate.training.tasks.shapes_model import (
    EARLY,
    IMAGE_BLOCKS,
    depths,
    exit_run,
    semantic_run,
)
from foveate.training.tasks.shapes_trained import recover_flops, stvit_weights


def drawn(count: int = 64, seed: int = 0, **kind: object) -> Pictures:
    rng = np.random.Generator(np.random.PCG64(seed))
    return draw_pictures(rng, count, **kind)  # type: ignore[arg-type]


def test_the_marked_shape_is_of_the_labelled_colour_and_its_patches_of_the_texture() -> None:
    pictures = drawn(128)
    texture_B = pictures.label_B % len(TEXTURES) + 1
    shown = pictures.marked_Bhw > 0.5
    assert shown.any((1, 2)).all()
    picture, *_ = shown.nonzero()
    np.testing.assert_array_equal(pictures.patch_Bhw[shown], texture_B[picture])

    # Red less blue of the shape's patches tells the colour: warm first, then cold.
    blocks = pictures.pixels_B3SS.reshape(-1, 3, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
    warm_Bhw = (blocks[:, 0] - blocks[:, 2]).mean((2, 4))
    whole = pictures.marked_Bhw == 1
    found_B = [warm[at].mean() < 0 for warm, at in zip(warm_Bhw, whole, strict=True) if at.any()]
    cold_B = pictures.label_B[whole.any((1, 2))] >= len(TEXTURES)
    assert len(COLOURS) == 2 and (np.array(found_B) == cold_B).mean() > 0.98


def test_one_shape_alone_has_the_white_outline() -> None:
    pictures = drawn(32, clutter=(0.0, 0.0))
    texture_B = pictures.label_B % len(TEXTURES) + 1
    for patch_hw, texture in zip(pictures.patch_Bhw, texture_B, strict=True):
        assert set(np.unique(patch_hw)) == {0, texture}
    bright = (pictures.pixels_B3SS.min(1) > 0.8).reshape(
        -1, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH
    )
    assert (bright.any((2, 4)) & (pictures.marked_Bhw > 0)).any((1, 2)).all()
    assert not (bright.any((2, 4)) & (pictures.marked_Bhw == 0)).any()


def test_clutter_brings_more_shapes() -> None:
    covered = [(drawn(clutter=(at, at)).patch_Bhw > 0).mean() for at in (0.0, 0.5, 1.0)]
    assert 0 < covered[0] < covered[1] < covered[2] < 0.5


def test_a_window_shows_the_marked_shape_whole() -> None:
    whole, part = drawn(clutter=(0.3, 0.3)), drawn(clutter=(0.3, 0.3), window=7)
    np.testing.assert_array_equal(whole.label_B, part.label_B)
    assert part.pixels_B3SS.shape[2:] == (7 * PATCH, 7 * PATCH)
    for number, (row, column) in enumerate(part.corner_B2):
        seen = whole.patch_Bhw[number, row : row + 7, column : column + 7]
        np.testing.assert_array_equal(seen, part.patch_Bhw[number])
    np.testing.assert_allclose(whole.marked_Bhw.sum((1, 2)), part.marked_Bhw.sum((1, 2)), rtol=1e-5)


def mosaics(count: int = 64) -> Mosaics:
    return draw_mosaics(np.random.Generator(np.random.PCG64(0)), count)


def test_mosaics_have_no_ground_and_patches_of_what_they_show() -> None:
    drawn_mosaics = mosaics()
    assert drawn_mosaics.patch_Bhw.min() == 1 and drawn_mosaics.patch_Bhw.max() == len(TEXTURES)
    np.testing.assert_allclose(drawn_mosaics.share_BT.sum(1), 1, rtol=1e-5)
    assert ((drawn_mosaics.share_BT > 0).sum(1) <= 3).all()
    kinds = np.arange(1, NUM_CLASSES)
    of_patches_BT = (drawn_mosaics.patch_Bhw[..., None] == kinds).mean((1, 2))
    assert np.abs(of_patches_BT - drawn_mosaics.share_BT).max() < 0.08
    held = HeldOut.mosaics(0, 102, 4, torch.device("cpu"))
    assert held.share_BT is not None and held.target is held.share_BT
    torch.testing.assert_close(held.label_B, held.share_BT.argmax(1))


def test_a_plain_mosaic_is_flatter_than_one_of_checks() -> None:
    drawn_mosaics = mosaics(128)
    deviation_Bhw = (
        drawn_mosaics.pixels_B3SS.mean(1)
        .reshape(-1, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
        .std((2, 4))
    )
    plain, *others = (deviation_Bhw[drawn_mosaics.patch_Bhw == kind].mean() for kind in range(1, 6))
    assert all(plain < 0.6 * other for other in others)


def test_held_out_pictures_are_none_of_the_training() -> None:
    task = make_task("shapes", "tiny")
    held = HeldOut.draw(0, 100, 4, torch.device("cpu"))
    seen = {x.numpy().tobytes() for x in held.pixels_B3SS}
    assert len(seen) == 4
    for stage in ("whole", "masks", "semantic"):
        for step in range(4):
            assert not seen & {x.numpy().tobytes() for x in task.batch(stage, step)["pixels"]}


@pytest.fixture(scope="module")
def modules() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    made = make_task("shapes", "tiny").build()
    for module in made.values():
        module.eval().requires_grad_(False)
    made["centres"].load_state_dict({"global_tokens": torch.randn(1, 16, 32)})
    return made


def test_depths_end_with_what_the_model_gives(modules: dict[str, torch.nn.Module]) -> None:
    pixels = torch.from_numpy(drawn(2).pixels_B3SS)
    *_, last = depths(modules["trunk"], pixels, torch.zeros(2, 2).long())
    expected = modules["trunk"](pixels).last_hidden_state
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


def test_the_semantic_network_trains_as_stvit_runs_it(
    modules: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    pixels = torch.from_numpy(drawn(2).pixels_B3SS)
    cls_BC, patch_BPC = semantic_run(modules, pixels)
    save_file(stvit_weights(modules), tmp_path / "w.safetensors")
    options = {"weights": str(tmp_path / "w.safetensors"), "after": IMAGE_BLOCKS, "num_heads": 2}
    with foveate.reduce(modules["semantic"], "stvit", **options) as run:  # type: ignore[arg-type]
        short = modules["semantic"](pixels).last_hidden_state
        assert run.report.stages[0].after == (17, 17)
    with foveate.reduce(modules["semantic"], "stvit", restore=True, **options):  # type: ignore[arg-type]
        full = modules["semantic"](pixels).last_hidden_state
    torch.testing.assert_close(short[:, 0], cls_BC, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full[:, 1:], patch_BPC, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_exits_train_as_dtop_runs(modules: dict[str, torch.nn.Module], tau: float) -> None:
    pixels, heads = torch.from_numpy(drawn(4).pixels_B3SS), modules["exits_masks"]
    assert isinstance(heads, torch.nn.ModuleList)
    found = exit_run(modules["exits"], list(heads), pixels, tau)
    options = {"tau": tau, "after": EARLY, "heads": tuple(heads)}
    with foveate.reduce(modules["exits"], "dtop", **options) as run:  # type: ignore[arg-type]
        modules["exits"](pixels)
    assert run.dense is not None and len(found) == len(EARLY) + 1
    left = (run.dense.stage_BP < len(EARLY)).double().mean()
    assert left > 0.2 if tau < 1 else left == 0
    canvas_BKP, class_BK2 = found[-1]
    torch.testing.assert_close(canvas_BKP, run.dense.mask_logits_BKP, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(class_BK2, run.dense.class_logits_BK2, rtol=1e-4, atol=1e-5)


def test_passes_are_timed_in_turn_with_their_methods(
    modules: dict[str, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldOut.draw(0, 100, 2, torch.device("cpu"))
    runs = [Pass(modules["trunk"], held), Pass(modules["trunk"], held, "tome", {"tokens": 59})]
    # Both of the first round, which does not count, then 2 s, 4 s, 6 s, 8 s, 4 s and 6 s.
    clock = iter([0, 9, 0, 9, 0, 2, 0, 4, 0, 6, 0, 8, 0, 4, 0, 6])
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("foveate.training.tasks.shapes_bench.time", fake)
    tokens: list[int] = []
    last = modules["trunk"].layers[-1]  # type: ignore[index]
    hook = last.register_forward_hook(lambda _, args, out: tokens.append(args[0].shape[1]))
    try:
        assert times(runs, 3) == [1000 * 4 / 2, 1000 * 6 / 2]
    finally:
        hook.remove()
    assert tokens[::2] == [197] * 4 and all(number < 100 for number in tokens[1::2])


def test_the_block_that_recovers_is_counted(modules: dict[str, torch.nn.Module]) -> None:
    # Width 32, hidden 64, 196 patches, 16 semantic tokens; a multiply-add is two.
    projections = 196 * 2 * 32 * 32 + 16 * 2 * 32 * 32
    by_hand = projections + 196 * 2 * 32 * 64 + 2 * 196 * 16 * 32
    assert recover_flops(modules, 3) == 2 * 3 * by_hand


def test_mean_iou_leaves_out_classes_that_never_occur() -> None:
    pairs = torch.zeros(NUM_CLASSES, NUM_CLASSES)
    pairs[0, 0], pairs[1, 1], pairs[1, 0] = 8, 1, 1
    assert mean_iou(pairs) == pytest.approx(100 * (8 / 9 + 1 / 2) / 2, abs=1e-3)
