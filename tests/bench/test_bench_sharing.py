from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.bench import Item, Suite
from foveate.bench.inputs import Prompts
from foveate.bench.sharing import SharedEncoder
from foveate.checkpoints import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "view"))
from checkpoints import save_checkpoint

FRAMES, CLIPS = 4, ["a", "b", "a", "a"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(save_checkpoint("llava_onevision", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def inputs(loaded: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    """Four questions about two clips."""
    generator = np.random.default_rng(0)
    videos = {
        name: generator.integers(0, 256, (FRAMES, 40, 64, 3), dtype=np.uint8) for name in "ab"
    }
    asked = [
        Item(str(n), name, videos[name], "what is in the video", (), "yes", "all")
        for n, name in enumerate(CLIPS)
    ]
    prompts = Prompts(*loaded, Suite("mine", asked), FRAMES)
    by_id = {prompt.item.id: prompt for prompt in prompts.prompts}
    return prompts.collate([by_id[str(n)] for n in range(len(CLIPS))])


def seen(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each run of a module really computes."""
    rows: list[int] = []
    forward = module.forward

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x))
        return forward(x, *args, **kwargs)

    monkeypatch.setitem(module.__dict__, "forward", counted)
    return rows


def features(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        found = model.model.get_video_features(inputs["pixel_values_videos"])
    return found.pooler_output


@pytest.fixture
def block(loaded: tuple[Any, Any]) -> Any:
    return SharedEncoder(loaded[0]).towers[0].blocks[0]


def test_each_clip_is_encoded_once(
    loaded: tuple[Any, Any],
    inputs: dict[str, torch.Tensor],
    block: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = loaded[0]
    plain = features(model, inputs)
    rows, inner = seen(block, monkeypatch), seen(block.mlp, monkeypatch)
    before = block.__dict__["forward"]
    with SharedEncoder(model).over(CLIPS):
        shared = features(model, inputs)
    assert rows == inner == [2 * FRAMES]
    torch.testing.assert_close(shared, plain)
    assert block.__dict__["forward"] is before
    features(model, inputs)
    assert rows[1:] == [len(CLIPS) * FRAMES]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_the_rows_of_all_questions(
    loaded: tuple[Any, Any],
    inputs: dict[str, torch.Tensor],
    block: Any,
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
) -> None:
    model, query = loaded[0], block.self_attn.q_proj
    hooked: list[torch.Tensor] = []
    record: Callable[..., None] = lambda module, args, *output: hooked.append(args[0])  # noqa: E731
    handle = getattr(query, hook)(record)
    try:
        plain = features(model, inputs)
        rows = seen(query, monkeypatch)
        with SharedEncoder(model).over(CLIPS):
            shared = features(model, inputs)
    finally:
        handle.remove()
    assert rows == [2 * FRAMES]
    assert [len(x) for x in hooked] == [len(CLIPS) * FRAMES] * 2
    torch.testing.assert_close(hooked[1], hooked[0])
    torch.testing.assert_close(shared, plain)


def test_rows_that_differ_are_not_shared(
    loaded: tuple[Any, Any],
    inputs: dict[str, torch.Tensor],
    block: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone()}
    changed["pixel_values_videos"][3, 0] += 0.5
    plain = features(loaded[0], changed)
    rows = seen(block, monkeypatch)
    with SharedEncoder(loaded[0]).over(CLIPS):
        assert torch.equal(features(loaded[0], changed), plain)
    assert rows == [len(CLIPS) * FRAMES]
    assert not torch.equal(plain, features(loaded[0], inputs))


def test_questions_about_different_clips_are_left_alone(
    loaded: tuple[Any, Any], block: Any
) -> None:
    with SharedEncoder(loaded[0]).over(["a", "b"]):
        assert "forward" not in block.__dict__
