"""Reports as text, as data and as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveate.core import Evidence, Grid, ItemReport, Reduction, Report, StageReport
from foveate.core.report import WRITERS, merge_layers


@pytest.fixture
def report() -> Report:
    keep = Reduction.select(torch.arange(4), 16)
    return Report(
        model="TinyModel",
        recipe="tome + fastv",
        budget="retain=0.25",
        stages=[
            StageReport("projector", "tome", (16, 16), (4, 16)),
            StageReport("decoder", "fastv", (4, 16), (2, 8), 2),
            StageReport("decoder", "fastv", (2, 8), (1, 4), 3),
        ],
        items=[
            ItemReport(0, "image", Grid.image(4, 4), keep, {2: torch.tensor([0, 3])}),
            ItemReport(
                1,
                "video",
                Grid.video(1, 4, 4),
                evidence=[Evidence("segments", "frames", ((0, 0),))],
            ),
        ],
        prompt_lengths=[10, 20],
        layer_lengths=[[10, 10, 8], [20, 20, 12]],
        flops={
            "untouched": {"prefill": 4e12, "total": 4e12},
            "reduced": {"prefill": 1e12, "total": 1e12},
        },
        seconds={"projector": 0.0123},
        notes=["nothing was measured"],
    )


def test_figures(report: Report) -> None:
    assert (report.visual_before, report.visual_after, report.retained) == (32, 20, 0.625)
    assert report.stages[0].retained == 20 / 32
    assert [item.after for item in report.items] == [4, 16]
    assert StageReport("cache", "x", (), ()).retained == 0.0


def test_text_shows_every_figure_in_its_row(report: Report) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "foveate: tome + fastv on TinyModel, retain=0.25"
    rows = {line.split("  ")[0]: line.split() for line in lines[2:]}
    assert rows["projector"][1:] == ["tome", "32", "20", "62.5%"]
    assert rows["decoder 2-3"][2:] == ["fastv", "20", "5", "25.0%"]
    assert rows["into the LLM"][3:] == ["32", "20", "62.5%"]
    assert rows["TFLOPs"][1:] == ["4.00", "1.00", "25.0%"]
    assert lines[-2:] == ["spent in methods: projector 12.3 ms", "note: nothing was measured"]
    widths = {len(line) for line in lines[1:6]}
    assert len(widths) == 1, "columns line up"


@pytest.mark.parametrize(
    ("flops", "shown"),
    [(2.5e14, "TFLOPs 250.00"), (7.1e10, "GFLOPs 71.00"), (2.5e7, "MFLOPs 25.00")],
)
def test_text_chooses_a_unit(report: Report, flops: float, shown: str) -> None:
    report.flops = {"untouched": {"total": flops}, "reduced": {"total": flops / 2}}
    rows = [" ".join(line.split()[:2]) for line in str(report).splitlines()]
    assert shown in rows


def test_text_of_unfinished_reports(report: Report) -> None:
    assert str(Report()) == "foveate: no visual tokens seen yet"
    report.flops = {"untouched": {"total": 4e12}}
    assert "TFLOPs" not in str(report)


def test_data_is_plain_and_apart_from_the_report(report: Report) -> None:
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["stages"][1] == {
        "stage": "decoder", "method": "fastv", "layer": 2, "before": [4, 16], "after": [2, 8],
        "retained": 0.5,
    }  # fmt: skip
    assert data["items"][0] == {
        "sample": 0, "modality": "image", "planes": [[4, 4]], "before": 16, "after": 4,
    }  # fmt: skip
    data["layer_lengths"][0].append(7)
    data["flops"]["reduced"]["total"] = 0.0
    data["notes"].clear()
    assert report.as_dict() != data
    assert report.layer_lengths[0] == [10, 10, 8] and report.notes


class TestMergeLayers:
    def rows(self, *stages: StageReport) -> list[tuple]:
        return [
            (row["stage"], row["method"], row["before"], row["after"], row["retained"])
            for row in merge_layers(stages)
        ]

    def test_decoder_layers_follow_each_other(self) -> None:
        assert self.rows(
            StageReport("decoder", "aim", (8, 2), (6, 2), 4),
            StageReport("decoder", "aim", (6, 2), (3, 1), 5),
            StageReport("decoder", "aim", (3, 1), (0, 1), 9),
        ) == [("decoder 4-9", "aim", 10, 1, 0.1)]

    def test_cache_layers_stand_side_by_side(self) -> None:
        assert self.rows(
            StageReport("cache", "quickvideo", (8,), (4,), 0),
            StageReport("cache", "quickvideo", (8,), (2,), 1),
        ) == [("cache 0-1", "quickvideo", 16, 6, 0.375)]

    def test_what_stays_apart(self) -> None:
        apart = [
            StageReport("projector", "a", (8,), (4,)),
            StageReport("projector", "a", (4,), (2,)),
            StageReport("decoder", "a", (2,), (1,), 3),
            StageReport("decoder", "b", (1,), (1,), 4),
            StageReport("cache", "b", (1,), (1,), 4),
        ]
        labels = [row[:2] for row in self.rows(*apart)]
        assert labels == [
            ("projector", "a"), ("projector", "a"), ("decoder 3", "a"), ("decoder 4", "b"),
            ("cache 4", "b"),
        ]  # fmt: skip
        assert self.rows() == []


class TestSave:
    @pytest.mark.parametrize("name", ["kept.json", "KEPT.JSON"])
    def test_figures_as_json(self, report: Report, tmp_path: Path, name: str) -> None:
        path = report.save(str(tmp_path / name))
        assert path == tmp_path / name
        assert json.loads(path.read_text()) == report.as_dict()
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize(("name", "seen"), [("kept.png", "'.png'"), ("kept", "without ending")])
    def test_unknown_endings(self, report: Report, tmp_path: Path, name: str, seen: str) -> None:
        with pytest.raises(ValueError, match=rf"{seen}; the endings are .json, .html"):
            report.save(tmp_path / name)

    @pytest.mark.parametrize("name", ["kept.json", "kept.html"])
    def test_missing_folder(self, report: Report, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"missing"):
            report.save(tmp_path / "missing" / name)

    def test_options_belong_to_pictures(self, report: Report, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="takes no options, got frames"):
            report.save(tmp_path / "kept.json", frames=None)

    def test_an_older_file_survives_a_failure(
        self, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "kept.json"
        path.write_text("older")

        def full(self: Path, text: str, **kwargs) -> int:
            self.touch()
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="disk full"):
            report.save(path)
        assert path.read_bytes() == b"older"
        assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]

    def test_other_endings_are_looked_up(
        self, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(WRITERS, ".txt", f"{__name__}:write_title")
        report.save(tmp_path / "kept.txt", title="hello")
        assert (tmp_path / "kept.txt").read_text() == "hello TinyModel"


def write_title(report: Report, path: Path, title: str) -> None:
    path.write_text(f"{title} {report.model}")
