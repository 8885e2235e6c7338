"""What ran when."""

from __future__ import annotations

import json

import pytest

from foveate.core.timeline import Timeline


def test_threads_of_one_stage_count_once():
    line = Timeline()
    line.add("decode", 0, 2, part=0)
    line.add("decode", 1, 3, part=1)
    line.add("prefill", 2.5, 5, part=0)
    line.add("decode", 8, 9, part=2)
    assert line.seconds() == {"decode": 4, "prefill": 2.5}
    assert line.busy() == 6
    assert line.overlap() == 0.5
    assert line.total() == 9


def test_stages_come_in_the_order_of_data_flow_and_survive_json():
    line = Timeline()
    with line.span("answer"):
        pass
    with line.span("decode", part=3):
        pass
    assert list(line.seconds()) == ["decode", "answer"]
    again = Timeline.from_dict(json.loads(json.dumps(line.as_dict())))
    assert again.spans == line.spans


def test_what_fails_leaves_no_span():
    line = Timeline()
    with pytest.raises(KeyError), line.span("encode"):
        raise KeyError
    assert line.spans == ()
    assert line.total() == line.overlap() == 0


@pytest.mark.parametrize(("stage", "span"), [("dekode", (0, 1)), ("decode", (2, 1))])
def test_bad_spans_are_refused(stage, span):
    with pytest.raises(ValueError, match="must"):
        Timeline().add(stage, *span)
