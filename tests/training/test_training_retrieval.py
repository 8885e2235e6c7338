"""The retrieval task: what its clips show, and that TempMe is trained as it is attached later.

Legend: B clips, F frames of each, D channels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import foveate
from foveate.methods.centerclip import CenterCLIP
from foveate.methods.tempme import TempMe
from foveate.training import TaskTraining, load_task, make_task
from foveate.training.tasks import retrieval_data
from foveate.training.tasks.retrieval_data import (
    FRAMES,
    PLACES,
    SIDE,
    VOCABULARY,
    Clips,
    captions_of,
    make_clips,
    objects_of,
    render_clips,
    sample_clips,
    tokenize,
)
from foveate.training.tasks.retrieval_measure import COPIES, SAMPLED, SHARES
from foveate.training.tasks.retrieval_model import (
    TempMeInTraining,
    Updates,
    embed_captions,
    embed_clips,
    make_clip,
    save_updates,
    updated,
)
from foveate.world.vocabulary import COLORS, SHAPES

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
METHOD = TempMe(layers=(1, 2, 3), clip_frames=FRAMES)


def clips_of(num: int = 64):
    return sample_clips(np.random.default_rng(3), num)


def all_frames(num: int) -> np.ndarray:
    return np.broadcast_to(np.arange(FRAMES), (num, FRAMES))


def a_model(updates: TempMe | None = METHOD):
    torch.manual_seed(0)
    clip = make_clip((32, 4, 2), (32, 2, 2)).eval().requires_grad_(False)
    made = Updates(clip, updates, FRAMES, rank=2)
    for parameter in made.parameters():  # as if it had been trained
        torch.nn.init.normal_(parameter, std=0.3)
    return clip, made


# -- data ------------------------------------------------------------------------------------------


def test_frames_show_what_captions_say() -> None:
    clips = clips_of()
    pixels_BF3HW = render_clips(clips, all_frames(64), np.random.default_rng(0)).float()
    for number, caption in enumerate(captions_of(clips)):
        sentences = [s.split() for s in caption.split(" .") if s]
        assert len(sentences) == clips.there_BO[number].sum()
        for words in sentences:
            rgb = torch.tensor(COLORS[words[1]]).float()[:, None, None]
            near_FHW = (pixels_BF3HW[number] - rgb).abs().amax(1) < 40
            for place in (word for word in words if word in PLACES):
                # Its region, in the first or in the last frame; another may pass in front of it.
                row, column = divmod(PLACES.index(place), 3)
                rows, columns = (slice(n * SIDE // 3, (n + 1) * SIDE // 3) for n in (row, column))
                seen_F = near_FHW[:, rows, columns].flatten(1).sum(1)
                assert max(seen_F[0], seen_F[-1]) >= 8


def test_captions_do_not_tell_which_way_things_move() -> None:
    clips = clips_of()
    backwards = replace(
        clips,
        places_BO2=clips.places_BO2[..., ::-1],
        centre_BO22=clips.centre_BO22[:, :, ::-1],
    )
    assert captions_of(backwards) == captions_of(clips)
    forth, back = (
        render_clips(x, all_frames(64), np.random.default_rng(0)) for x in (clips, backwards)
    )
    assert (forth.float() - back.flip(1).float()).abs().mean() < 3  # the noise of 2 alone


def test_named_objects_are_those_of_the_caption() -> None:
    clips = clips_of()
    facts = [*SHAPES, *PLACES]
    for caption, objects in zip(captions_of(clips), objects_of(clips), strict=True):
        named = set()
        for sentence in caption.split(" .")[:-1]:
            words = sentence.split()
            named |= {(words[1], word) for word in words if word in facts}
        colors = tuple(COLORS)
        assert {(colors[c], facts[k]) for c, k in objects.nonzero().tolist()} == named


def test_grounds_stay_and_frames_have_noise_of_their_own() -> None:
    clips = clips_of(8)
    empty = replace(clips, there_BO=np.zeros_like(clips.there_BO))
    x_BF3HW = render_clips(empty, all_frames(8), np.random.default_rng(0)).float()
    mean_B3HW = x_BF3HW.mean(1)
    assert 1.5 < (x_BF3HW - mean_B3HW[:, None]).std() < 2.5
    beside_B3HW = mean_B3HW[..., 1:] - mean_B3HW[..., :-1]  # without the gradient from top down
    assert 7 < beside_B3HW.std() / 2**0.5 < 9


def test_segments_are_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def render(clips: Clips, frame_BF: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        seen.append(frame_BF)
        return render_clips(clips, frame_BF, rng)

    monkeypatch.setattr(retrieval_data, "render_clips", render)
    assert make_clips((0,), 32, 6, 3)["pixels"].shape[1] == 6
    frame_BS3 = seen[0].reshape(32, 2, 3)
    assert (np.diff(frame_BS3, axis=2) == 1).all() and (frame_BS3[..., 0] % 3 == 0).all()
    assert (frame_BS3[:, 0, 0] < frame_BS3[:, 1, 0]).all()
    assert len(np.unique(frame_BS3[..., 0], axis=0)) == 6  # all pairs of four segments


def test_shapes_differ() -> None:
    clips = clips_of(len(SHAPES))
    num = len(SHAPES)
    there = np.zeros((num, 3), bool)
    there[:, 0] = True
    same = replace(
        clips,
        there_BO=there,
        shape_BO=np.arange(num)[:, None].repeat(3, 1),
        color_BO=np.zeros((num, 3), int),
        radius_BO=np.full((num, 3), 6, np.float32),
        centre_BO22=np.full((num, 3, 2, 2), 20, np.float32),
        ground_B23=np.zeros((num, 2, 3), np.float32),
    )
    red_BHW = render_clips(same, np.zeros((num, 1)), np.random.default_rng(0))[:, 0, 0] > 110
    covered_B = red_BHW.flatten(1).sum(1)
    assert covered_B.min() > 30 and covered_B.max() < 150
    differs_BB = (red_BHW[:, None] ^ red_BHW[None]).flatten(2).sum(2)
    assert (differs_BB + 100 * torch.eye(num, dtype=torch.long)).min() >= 12
    # Nothing outside the circle of its radius, but for the pixels of its edge.
    at = torch.arange(SIDE) + 0.5 - 20
    assert not (red_BHW & (at[:, None] ** 2 + at**2 > 8.5**2)).any()


def test_words_are_numbers() -> None:
    caption = captions_of(clips_of(1))[0]
    (row,) = tokenize([caption.upper()])
    words = [VOCABULARY[i] for i in row.tolist()]
    assert words[0] == "<start>" and words[1 : words.index("<end>")] == caption.split()
    assert set(words[words.index("<end>") + 1 :]) <= {"<pad>"}
    with pytest.raises(ValueError, match=r"words that are not known: dog\. Known ones are a, an"):
        tokenize(["a dog stays"])
    with pytest.raises(ValueError, match="at most 33 words, got 40"):
        tokenize(["a " * 40])


# -- model -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_clips_are_means_of_their_frames_in_any_order() -> None:
    clip, _ = a_model()
    pixels = make_clips((0,), 3)["pixels"]
    found_BE = embed_clips(clip, pixels)
    torch.testing.assert_close(embed_clips(clip, pixels.flip(1)), found_BE, **CLOSE)
    torch.testing.assert_close(found_BE.norm(dim=1), torch.ones(3))
    each = clip.get_image_features(pixel_values=(pixels[0] / 255 - 0.4) / 0.25).pooler_output
    mean_E = torch.nn.functional.normalize(each, dim=-1).mean(0)
    torch.testing.assert_close(found_BE[0], mean_E / mean_E.norm(), **CLOSE)


def test_tempme_is_trained_as_its_weights_are_applied(tmp_path: Path) -> None:
    clip, updates = a_model()
    pixels = make_clips((0,), 2)["pixels"]
    path = str(tmp_path / "weights.safetensors")
    save_updates(updates, path)
    with torch.no_grad(), foveate.reduce(clip, replace(METHOD, weights=path)) as run:
        applied_BE = embed_clips(clip, pixels, FRAMES)
        bare = run.report.stages[0]
    with foveate.reduce(clip, TempMeInTraining(**{**vars(METHOD), "updates": updates})) as run:
        trained_BE = embed_clips(clip, pixels, FRAMES)
        assert run.report.stages[0].after == bare.after
    torch.testing.assert_close(trained_BE, applied_BE, **CLOSE)
    with torch.no_grad(), foveate.reduce(clip, METHOD):
        assert (embed_clips(clip, pixels, FRAMES) - applied_BE).abs().max() > 1e-2
    trained_BE.square().matmul(torch.arange(32.0)).sum().backward()
    for name, parameter in updates.visual.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert [tuple(x.shape) for n, x in updates.named_parameters() if "Positional" in n] == [
        (1, 12, 1, 32),
        (1, 6, 1, 32),
        (1, 3, 1, 32),
    ]


def test_random_tokens_are_other_ones_every_step() -> None:
    task = make_task("retrieval", "tiny")
    torch.manual_seed(0)
    modules = task.build()
    batch = task.batch("random_12", 0)
    with torch.no_grad():
        for stage, differ in (("random_12", True), ("centerclip_12", False), ("whole", False)):
            first, second = (
                task.loss(stage, modules, {**batch, "step": torch.tensor(step)})[0]
                for step in (0, 1)
            )
            assert (first != second) == differ


@torch.no_grad()
def test_weighting_by_sizes_needs_no_training() -> None:
    clip, _ = a_model()
    pixels = make_clips((0,), 2)["pixels"]
    same = pixels[:, :1].expand(-1, FRAMES, -1, -1, -1)  # each patch three times in a segment
    plain, weighted = (CenterCLIP(prop_attn=on, clip_frames=FRAMES) for on in (False, True))
    found = {}
    for method in (plain, weighted):
        with foveate.reduce(clip, method, retain=1 / 3):
            found[method] = embed_clips(clip, same)
    torch.testing.assert_close(found[plain], embed_clips(clip, same), **CLOSE)
    # [CLS] of three frames counts three times as much, too: all sizes are alike.
    torch.testing.assert_close(found[weighted], found[plain], **CLOSE)
    for method in (plain, weighted):
        with foveate.reduce(clip, method, retain=1 / 12) as run:
            found[method] = embed_clips(clip, same)
            assert sum(run.report.stages[0].after) > 0
    assert (found[weighted] - found[plain]).abs().max() > 1e-4


def test_copies_are_tuned_at_every_share() -> None:
    assert list(SAMPLED.values()) == [
        (algorithm, share) for share in SHARES for algorithm in ("k_medoids", "random")
    ]
    assert set(make_task("retrieval").stages) == {
        "frames",
        "clips",
        "unmerged",
        "tempme",
        *COPIES,
    }


@torch.no_grad()
def test_updates_of_captions_are_those_of_changed_weights() -> None:
    clip, updates = a_model(None)
    words = make_clips((0,), 4)["words"]
    before = embed_captions(clip, words)
    with updated(clip.text_model, updates.text):
        inside = embed_captions(clip, words)
    torch.testing.assert_close(embed_captions(clip, words), before)  # removed again
    assert (inside - before).abs().max() > 1e-2
    for layer, block in zip(clip.text_model.encoder.layers, updates.text, strict=True):
        low = block.attn
        for name, b_Dr in zip("qkv", low.TVPt_LoRA_b.chunk(3), strict=True):
            getattr(layer.self_attn, f"{name}_proj").weight += b_Dr @ low.TVPt_LoRA_a
    torch.testing.assert_close(embed_captions(clip, words), inside, atol=1e-4, rtol=1e-4)


def test_updates_alone_learn_behind_the_second_stage(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    TaskTraining(make_task("retrieval", "tiny"), folder, every=1).run()
    trained = load_file(folder / "model.safetensors")
    state = torch.load(folder / "clips.pt", weights_only=True)["modules"]
    for name, x in state["clip"].items():
        assert torch.equal(trained[f"clip.{name}"], x)
    for stage in COPIES:  # which have gone on
        gone_BD = trained[f"{stage}.visual_projection.weight"]
        moved = (gone_BD - trained["clip.visual_projection.weight"]).abs().max()
        assert 0 < moved < 0.1
    learned = [
        name
        for name, x in state["tempme"].items()
        if not torch.equal(trained[f"tempme.{name}"], x) and "LoRA_b" in name
    ]
    assert len(learned) == 4 + 1  # every block of both encoders
    _, modules = load_task(folder)
    weights = tmp_path / "tempme.safetensors"
    save_updates(modules["tempme"], weights)
    with torch.no_grad(), foveate.reduce(modules["clip"], replace(METHOD, weights=str(weights))):
        embed_clips(modules["clip"], make_clips((0,), 1)["pixels"], FRAMES)
