"""A model that every test must leave as it was."""

from __future__ import annotations

import pytest
from attach_suite import assert_same, logits_of, model_of, one_of, snapshot


@pytest.fixture
def model():
    """A model of the cache, checked to be clean before and after."""
    found = model_of("llava_onevision")
    logits_of(
        found, one_of("llava_onevision"), output_hidden_states=True
    )  # transformers' own hooks
    before = snapshot(found)
    yield found
    assert_same(before, snapshot(found))
