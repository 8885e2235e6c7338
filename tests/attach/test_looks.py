"""What a scorer is shown: each frame once, in windows, chunk by chunk, however long the clip."""

from __future__ import annotations

import weakref

import pytest
import torch

import foveate
from foveate.attach import looks
from foveate.attach.looks import CHUNK, Looks
from foveate.video import Clip


class Brightness:
    """Counts the frames that it is shown, and those of its past that are still alive."""

    probabilities = True

    def __init__(self, window: int = 1, size: tuple[int, int] = (4, 4)) -> None:
        self.window, self.size = window, size
        self.calls: list[list[int]] = []
        self.most_alive = 0
        self._seen: list[weakref.ref] = []

    def relevance(self, pixels_T3hw, question):
        self._seen.append(weakref.ref(pixels_T3hw))
        alive = [seen() for seen in self._seen]
        self.most_alive = max(self.most_alive, sum(len(x) for x in alive if x is not None))
        value_T = pixels_T3hw.float().mean((1, 2, 3)) / 255
        self.calls.append((value_T * 255).round().long().tolist())
        value_w = torch.stack([part.mean() for part in value_T.split(self.window)])
        return value_w.repeat_interleave(self.window)[: len(value_T)]


class Space(Brightness):
    def embed(self, pixels_T3hw):
        value_T = self.relevance(pixels_T3hw, "")
        return torch.nn.functional.normalize(torch.stack([value_T, 1 - value_T], 1), dim=1)

    def embed_text(self, text):
        return torch.tensor([[1.0, 0.0]])


def clip(num: int, fps: float = 1.0) -> Clip:
    level = (torch.arange(num) % 256).to(torch.uint8)[:, None, None, None]
    return Clip(level.expand(-1, 3, 8, 8).clone(), fps=fps)


def test_windows_are_whole_and_in_order() -> None:
    scorer = Brightness(window=3)
    ranks = torch.tensor([9, 0, 4, 2, 6, 20, 11, 30])
    value = Looks(clip(40), scorer).relevance(ranks, "why")
    assert scorer.calls == [[0, 2, 4, 6, 9, 11, 20, 30]]
    means = {0: 2, 2: 2, 4: 2, 6: 26 / 3, 9: 26 / 3, 11: 26 / 3, 20: 25, 30: 25}
    assert torch.allclose(value * 255, torch.tensor([means[r] for r in ranks.tolist()]), atol=1e-4)


def test_a_window_is_asked_about_once() -> None:
    scorer, shown = Brightness(window=2), clip(40)
    first = Looks(shown, scorer).relevance(torch.arange(4), "why")
    again = Looks(shown, scorer).relevance(torch.arange(4), "why")
    assert torch.equal(first, again) and scorer.calls == [[0, 1, 2, 3]]
    Looks(shown, scorer).relevance(torch.tensor([0, 1, 3]), "why")
    assert scorer.calls[1:] == [[3]], "a window of other frames is another question"
    Looks(shown, scorer).relevance(torch.arange(4), "how")
    assert scorer.calls[2:] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("window", [0, -1, 1.5, True])
def test_bad_windows_are_named(window) -> None:
    with pytest.raises(ValueError, match="window must be a whole number"):
        Looks(clip(4), Brightness(window=window))


def test_chunks_hold_whole_windows() -> None:
    scorer = Brightness(window=5)
    Looks(clip(200), scorer).relevance(torch.arange(200), "why")
    assert [len(call) for call in scorer.calls] == [60, 60, 60, 20]


@pytest.mark.parametrize("kind", [Brightness, Space])
def test_memory_does_not_grow_with_the_clip(kind, monkeypatch) -> None:
    monkeypatch.setattr(looks, "KEPT_BYTES", 32 * 3 * 4 * 4)
    alive = {}
    for num in (200, 1000):
        scorer, shown = kind(), clip(num)
        taken = foveate.choose_frames(shown, "f2c@frames", "why", 8, scorer=scorer, retain=0.5)
        memory = looks._SEEN[shown][scorer]
        assert sum(len(call) for call in scorer.calls) == num, "each frame once"
        assert len(memory.copy_3hw) == (32 if kind is Brightness else 0) and len(taken) <= 4
        held = {copy.untyped_storage().nbytes() for copy in memory.copy_3hw.values()}
        assert held <= {3 * 4 * 4}, "a kept copy holds nothing but itself"
        alive[num] = scorer.most_alive
    assert alive[200] == alive[1000] <= 2 * CHUNK


def test_frames_beyond_what_is_kept_are_decoded_anew(monkeypatch) -> None:
    monkeypatch.setattr(looks, "KEPT_BYTES", 10 * 3 * 4 * 4)
    scorer, shown = Brightness(), clip(100)
    decoded: list[int] = []
    stream = shown.stream

    def counted(*args, **kwargs):
        decoded.extend(kwargs["index"])
        return stream(*args, **kwargs)

    monkeypatch.setattr(shown, "stream", counted)
    ranks = torch.tensor([0, 50, 5, 99])
    first = Looks(shown, scorer).relevance(torch.arange(100), "why")
    second = Looks(shown, scorer).relevance(ranks, "how")
    assert torch.equal(second, first[ranks]) and decoded == [*range(100), 50, 99]
    Looks(shown, scorer).embeddings(torch.arange(100))
    assert decoded == [*range(100), 50, 99], "small pictures were made on the way"


def test_progress_counts_frames() -> None:
    told: list[tuple[int, int]] = []
    seen = Looks(clip(150), Brightness(), lambda done, total: told.append((done, total)))
    seen.relevance(torch.arange(150), "why")
    assert told == [(0, 150), (64, 150), (128, 150), (150, 150)]
    seen.relevance(torch.arange(150), "why")
    seen.embeddings(torch.arange(150))
    assert len(told) == 4, "nothing left to look at"


def test_a_failing_scorer_stops_the_decoder(tmp_path) -> None:
    import threading

    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for _ in range(400):
            picture = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())

    class Failing(Brightness):
        def relevance(self, pixels_T3hw, question):
            raise RuntimeError("no")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no"):
        Looks(Clip(path), Failing()).relevance(torch.arange(400), "why")
    assert threading.active_count() == before
