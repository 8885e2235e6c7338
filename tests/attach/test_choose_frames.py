"""The frames stage: from the packet table to the plan that later stages read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attach_suite import logits_of, model_of

import foveate
from foveate.attach.looks import Looks
from foveate.core import Budget, Card, FramePlan, Method, ProjectorContext, Recipe, Reduction
from foveate.errors import AttachmentError, MissingSignalError
from foveate.video import Clip
from tiny import Sample, tiny_inputs


@dataclass(frozen=True)
class Ends(Method):
    """Shows the first and the last frame; keeps what the projector saw of the plan."""

    card = Card("ends", "Ends", "A test", ("frames", "projector"), "baseline", "Shows both ends.")

    def frames(self, context):
        last = context.num_candidates - 1
        seen.append(context)
        return FramePlan(torch.tensor([0, last]), score_K=torch.tensor([0.25, 0.75]))

    def projector(self, tokens, context: ProjectorContext):
        seen.append(context.plan)
        keep = context.budget.count(tokens.num_tokens)
        return Reduction.select(torch.arange(keep), tokens.num_tokens)


seen: list = []


class Counting:
    """Relevance is brightness; counts the frames that it is shown."""

    size, probabilities = (4, 4), True

    def __init__(self) -> None:
        self.shown = 0

    def relevance(self, pixels_T3hw, question):
        self.shown += len(pixels_T3hw)
        return pixels_T3hw.float().mean((1, 2, 3)) / 255


class Space(Counting):
    """The same with a space of two axes: bright and dark."""

    def embed(self, pixels_T3hw):
        bright_T = self.relevance(pixels_T3hw, "")
        return torch.nn.functional.normalize(torch.stack([bright_T, 1 - bright_T], dim=1), dim=1)

    def embed_text(self, text):
        return torch.tensor([[1.0, 0.0] if text == "bright" else [0.0, 2.0]])


def clip(num: int = 40) -> Clip:
    level = torch.arange(num, dtype=torch.uint8)[:, None, None, None] * 6
    return Clip(level.expand(-1, 3, 8, 8).clone(), fps=2)


@pytest.fixture(autouse=True)
def _forget():
    seen.clear()


def test_frames_are_those_of_the_plan():
    taken = foveate.choose_frames(clip(), Ends(), "why", retain=0.5)
    assert taken.index.tolist() == [0, 39] and taken.seconds.tolist() == [0.0, 19.5]
    assert taken.pixels[:, 0, 0, 0].tolist() == [0, 39 * 6]
    assert taken.plan.method == "ends" and taken.plan.num_candidates == 40
    assert taken.to("cpu").plan is taken.plan
    (context,) = seen
    assert context.question == "why" and context.keyframe_F.all() and not len(context.bytes_F)


def test_nothing_to_choose_is_even_sampling():
    for recipe, retain in (("divprune", 0.5), (Ends(), 1.0), ("ends@projector", 0.5)):
        made = Recipe.of(Ends()) if recipe == "ends@projector" else Recipe.of(recipe)
        if recipe == "ends@projector":
            made = Recipe.of(foveate.core.Step(Ends(), ("projector",)))
        taken = foveate.choose_frames(clip(), made, frames=4, retain=retain)
        assert taken.plan is None and taken.index.tolist() == clip().sample(4).index.tolist()


def test_a_frame_is_looked_at_once():
    shown, scorer = clip(), Counting()
    first = foveate.choose_frames(shown, "quota", "why", 4, scorer=scorer, retain=0.5)
    looked = scorer.shown
    assert looked == len(first.plan.index_K)
    again = foveate.choose_frames(shown, "quota", "why", 4, scorer=scorer, retain=0.5)
    assert scorer.shown == looked and torch.equal(again.plan.score_K, first.plan.score_K)
    foveate.choose_frames(clip(), "quota", "why", 4, scorer=scorer, retain=0.5)
    assert scorer.shown == 2 * looked, "another clip"


def test_a_space_serves_every_question():
    shown, scorer = clip(), Space()
    looks, index = Looks(shown, scorer), torch.tensor([39, 0, 5])
    bright = looks.relevance(index, "bright")
    dark = Looks(shown, scorer).relevance(index, "dark")
    assert scorer.shown == 3
    assert bright.argmax() == 0 and dark.argmax() == 1
    assert torch.allclose(looks.embeddings(index).norm(dim=1), torch.ones(3))
    small = Looks(shown, Counting()).embeddings(index)
    assert small.shape == (3, 3 * 8 * 8)


def test_bad_scorers_are_named():
    with pytest.raises(ValueError, match="relevance"):
        foveate.choose_frames(clip(), "quota", scorer=object(), retain=0.5)
    scorer = Counting()
    scorer.relevance = lambda pixels, question: torch.zeros(2)
    with pytest.raises(ValueError, match="one finite number per frame"):
        foveate.choose_frames(clip(), "quota", scorer=scorer, retain=0.5)
    with pytest.raises(MissingSignalError, match="scorer"):
        foveate.choose_frames(clip(), "quota", retain=0.5)
    with pytest.raises(ValueError, match="frames must be"):
        foveate.choose_frames(clip(), Ends(), frames=0)


def test_packet_facts_of_a_file(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.gop_size = 5
        for level in range(12):
            picture = torch.full((32, 32, 3), 100 + level, dtype=torch.uint8)
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    foveate.choose_frames(path, Ends(), retain=0.5)
    (context,) = seen
    keyframes = Clip(path).info.keyframe_index
    assert torch.equal(context.keyframe_F.nonzero()[:, 0], keyframes) and 0 < len(keyframes) < 12
    assert context.bytes_F.shape == (12,) and int(context.bytes_F.min()) > 0
    isolated = Clip(path, isolate=True)
    assert torch.equal(isolated.info.packet_bytes, context.bytes_F)


# -- later stages --------------------------------------------------------------------------------


def test_later_stages_read_the_plan():
    """Video, then image in one sample, video alone in another: plans follow the prompt."""
    family = "llava_onevision"
    model = model_of(family)
    samples = (
        Sample((3, 2, 9), ("video", "image"), seed=0),
        Sample(items=("video",), seed=1),
    )
    inputs = tiny_inputs(family, samples=samples)
    with foveate.reduce(model, Ends(), retain=0.5) as run:
        logits_of(model, inputs)
        assert seen == [None] * 3
        assert any("chosen elsewhere" in note for note in run.report.notes)
        planes = [len(item.grid.planes) for item in run.report.items]
        plans = [
            FramePlan(torch.arange(n) + 7 * i, method="ends", num_candidates=90)
            for i, n in enumerate(planes)
        ]
        run.plans = [plans[0], None, plans[2]]
        seen.clear()
        logits_of(model, inputs)
        assert seen == [plans[0], None, plans[2]]
        assert not any("chosen elsewhere" in note for note in run.report.notes)
        stage = run.report.stages[0]
        assert (stage.stage, stage.method) == ("frames", "ends")
        assert (stage.before, stage.after) == ((90, 90), (planes[0], planes[2]))
        run.plans = plans[:1]
        with pytest.raises(AttachmentError, match="1 plans"):
            logits_of(model, inputs)
        run.plans = [FramePlan(torch.arange(planes[0] + 1)), None, None]
        with pytest.raises(AttachmentError, match="does not fit"):
            logits_of(model, inputs)


def test_planes_of_two_frames():
    family = "qwen2_vl"
    model = model_of(family)
    inputs = tiny_inputs(family, samples=(Sample(items=("video",), seed=0),))
    with foveate.reduce(model, Ends(), retain=0.5) as run:
        logits_of(model, inputs)
        planes = len(run.report.items[0].grid.planes)
        run.plans = [FramePlan(torch.arange(2 * planes))]
        logits_of(model, inputs)
        assert seen[-1].index_K.tolist() == list(range(0, 2 * planes, 2))
        beams = model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=2)
    assert len(beams) == 1


def test_full_budget_asks_nobody():
    family = "llava_onevision"
    model = model_of(family)
    inputs = tiny_inputs(family, samples=(Sample(items=("video",), seed=0),))
    with foveate.reduce(model, Ends(), retain=1.0) as run:
        logits_of(model, inputs)
        assert not seen and not run.report.notes
    assert Budget().is_full
