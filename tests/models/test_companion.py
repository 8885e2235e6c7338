"""Companions: text and pictures in one space, and the signals that methods read of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import foveate
from foveate.attach.pairing import Pairing
from foveate.core import Grid, Plane
from foveate.errors import AttachmentError, UnsupportedModelError
from foveate.models.companion import Companion

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 8}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}


class Letters:
    """A tokenizer: one id per letter, the last id ends a text."""

    def __call__(self, texts, padding, return_tensors, truncation=False, max_length=None):
        ids = [*(1 + ord(letter) % 90 for letter in texts[0][: max_length - 1]), 98]
        self.asked = {"padding": padding, "length": len(ids)}
        if padding:
            ids += [0] * (max_length - len(ids))
        ids = torch.tensor([ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def decode(ids):
    return " ".join(map(str, ids))


def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {**TEXT, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)).eval()


def siglip() -> SiglipModel:
    torch.manual_seed(0)
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()


def pictures(num: int = 3, height: int = 40, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, 3, height, width), generator=generator, dtype=torch.uint8)


def test_clip_is_what_transformers_computes() -> None:
    model, tokenizer = clip(), Letters()
    companion = Companion(model, tokenizer, decode, batch=2)
    with torch.no_grad():
        inputs = tokenizer(["where is it"], False, "pt", True, 8)
        stored = model.get_text_features(**inputs)
        expected = getattr(stored, "pooler_output", stored)
    torch.testing.assert_close(companion.embed_text("where is it"), expected)
    assert tokenizer.asked == {"padding": False, "length": 8}  # cut to the limit

    same_size = pictures(height=32, width=32)
    frames_TE, patches_ThwE = companion.embed_pictures(same_size)
    assert frames_TE.shape == (3, 12) and patches_ThwE.shape == (3, 4, 4, 12)
    mean, std = (torch.tensor(v)[:, None, None] for v in (companion.mean, companion.std))
    with torch.no_grad():
        out = model.vision_model(pixel_values=(same_size / 255 - mean) / std)
        states = model.visual_projection(out.last_hidden_state[:, 1:]).unflatten(1, (4, 4))
        pooled = model.visual_projection(out.pooler_output)
    torch.testing.assert_close(frames_TE, pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(patches_ThwE, states, atol=1e-5, rtol=1e-4)


def test_siglip_pools_every_patch_alone() -> None:
    model, tokenizer = siglip(), Letters()
    companion = Companion(model, tokenizer, decode)
    frames_TE, patches_ThwE = companion.embed_pictures(pictures())
    assert frames_TE.shape == (3, 16) and patches_ThwE.shape == (3, 4, 4, 16)
    assert companion.embed_text("hi").shape == (1, 16)
    assert tokenizer.asked["padding"] == "max_length"
    # A picture of one patch is that patch.
    states_1PC = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = model.vision_model.head(states_1PC[:, 5:6])
        torch.testing.assert_close(companion._patches(states_1PC)[0, 1, 1], alone[0])


def test_batches_do_not_show() -> None:
    model = clip()
    one = Companion(model, Letters(), decode, batch=1).embed_pictures(pictures(5))
    all_at_once = Companion(model, Letters(), decode, batch=9).embed_pictures(pictures(5))
    for alone, together in zip(one, all_at_once, strict=True):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lead", ["\nassistant\n", " ASSISTANT:", ""])
def test_the_role_that_leads_to_the_answer_is_no_instruction(lead: str) -> None:
    given = SimpleNamespace(decode=lambda ids, skip_special_tokens: f" What is it?{lead}")
    assert Companion(clip(), Letters(), given).decode([1, 2]) == "What is it?"
    assert Companion(clip(), Letters(), SimpleNamespace(tokenizer=given)).decode([1]).endswith("?")


def test_bad_companions_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no get_text_features and no get_image"):
        Companion(nn.Linear(2, 2), Letters(), decode)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        Companion(clip(), object(), decode)
    with pytest.raises(ValueError, match="decode must be"):
        Companion(clip(), Letters(), 7)
    with pytest.raises(ValueError, match="at least 1 picture"):
        Companion(clip(), Letters(), decode, batch=0)
    with pytest.raises(ValueError, match="must give text, got list"):
        Companion(clip(), Letters(), list).decode([1])
    with pytest.raises(ValueError, match="pictures must be uint8"):
        Companion(clip(), Letters(), decode).embed_pictures(torch.zeros(3, 8, 8))


def pairing(grid: Grid, companion: Companion | None = None, **more) -> Pairing:
    generator = torch.Generator().manual_seed(3)
    x_1ND = torch.randn(1, grid.num_tokens, 6, generator=generator)
    text_1SD = torch.randn(1, 4, 6, generator=generator)
    return Pairing(grid, x_1ND, text_1SD, companion=companion, **more)


def test_without_a_companion_the_embeddings_are_compared() -> None:
    grid = Grid.video(3, 2, 4, newlines_at_end=1)
    pair = pairing(grid)
    mean_D = pair.instruction_1SD[0].mean(0)
    patch_TLD = pair.x_1ND[0, :-1].view(3, 8, 6)
    frame = pair.read("text.frame_similarity")
    torch.testing.assert_close(frame[0], torch.cosine_similarity(patch_TLD.mean(1), mean_D, dim=1))
    patch = pair.read("text.patch_similarity")
    expected_N = torch.cosine_similarity(patch_TLD.flatten(0, 1), mean_D, dim=1)
    torch.testing.assert_close(patch[0, :-1], expected_N)
    assert patch[0, -1].isnan() and pair.read("text.tokens") is None


@pytest.mark.parametrize(
    "grid",
    [
        Grid.video(3, 4, 4, newlines_at_end=1),
        Grid.video(3, 2, 2),
        Grid.video(3, 3, 8),
        Grid((Plane(4, 4), Plane(8, 6, row_newline=True), Plane(2, 4))),
    ],
    ids=["same", "coarser", "finer", "planes of three sizes"],
)
def test_a_companion_scores_the_tokens_of_any_grid(grid: Grid) -> None:
    companion = Companion(clip(), Letters(), decode)
    ids = torch.tensor([3, 4])
    pair = pairing(grid, companion, ids=ids, pixels=pictures)
    frames_TE, states_ThwE = companion.embed_pictures(pictures())
    text_1E = companion.embed_text("3 4")
    expected_1T = torch.cosine_similarity(frames_TE, text_1E)[None]
    torch.testing.assert_close(pair.read("text.frame_similarity"), expected_1T)
    torch.testing.assert_close(pair.read("paired.frames"), frames_TE[None])
    embedded = pair.read("paired.patches")
    assert embedded.shape == (1, grid.num_tokens, 12)
    patch_P = grid.patch_index()
    assert embedded[0, patch_P].isfinite().all()
    assert pair.read("text.patch_similarity").isnan().sum() == grid.num_tokens - len(patch_P)
    if grid.planes[0].num_patches == 16:
        torch.testing.assert_close(embedded[0, :16], states_ThwE[0].flatten(0, 1))
    if grid.planes[0].num_patches == 4:
        torch.testing.assert_close(embedded[0, 0], states_ThwE[0, :2, :2].mean((0, 1)))


def test_text_and_pictures_are_encoded_once_per_call() -> None:
    companion, runs = Companion(clip(), Letters(), decode), []
    for name in ("text_model", "vision_model"):
        getattr(companion.model, name).register_forward_hook(
            lambda *_, name=name: runs.append(name)
        )
    shown, known = pictures(), {}
    for _ in range(2):
        pair = pairing(
            Grid.video(3, 4, 4),
            companion,
            ids=torch.tensor([5]),
            pixels=lambda: shown,
            known=known,
        )
        for name in ("text.frame_similarity", "text.patch_similarity", "paired.text"):
            pair.read(name)
    assert sorted(runs) == ["text_model", "vision_model"]


def test_what_a_companion_needs_must_be_there() -> None:
    companion = Companion(clip(), Letters(), decode)
    with pytest.raises(AttachmentError, match="pass input_ids"):
        pairing(Grid.video(3, 4, 4), companion).read("paired.text")
    with pytest.raises(AttachmentError, match="pixels"):
        pairing(Grid.video(3, 4, 4), companion).read("paired.patches")


def test_the_companion_decides() -> None:
    """Through a model: the frame that the companion prefers is the one that stays sharp."""
    from tiny import Sample, tiny_inputs, tiny_model

    model = tiny_model("llava_onevision")
    inputs = tiny_inputs("llava_onevision", samples=(Sample(items=("video",)),))
    seen = []

    class Favourite(Companion):
        def embed_text(self, text):
            seen.append(text)
            return torch.tensor([[1.0, 0.0]])

        def embed_pictures(self, pixels_T3hw):
            frames_TE = torch.tensor([[0.0, 1.0]]).repeat(len(pixels_T3hw), 1)
            frames_TE[-1] = torch.tensor([1.0, 0.0])
            return frames_TE, frames_TE[:, None, None].expand(-1, 4, 4, -1)

    companion = Favourite(clip(), Letters(), decode)
    paths = ("slow_1frms", "roi10-middle_0frms", "24x12-fast_9frms_1x1")
    spec = "_spatial_1d_max_pool_".join(paths)
    with (
        foveate.reduce(model, "free_video_llm", spec=spec, tokens=10, companion=companion) as run,
        torch.no_grad(),
    ):
        model(**inputs)
    (item,) = run.report.items
    num, patches = len(item.grid.planes), item.grid.planes[0]
    sharp = patches.height * -(-patches.width // 2)
    anchor_M = item.reduction.anchor_BM[0, : sharp + num]
    times = item.grid.positions()[anchor_M, 0].tolist()
    assert times == [num - 1] * sharp + list(range(num))
    ids = inputs["input_ids"][0].tolist()
    behind = len(seen[0].split())
    assert seen[0] == decode(ids[-behind:]) and behind < len(ids) and len(seen) == 1
