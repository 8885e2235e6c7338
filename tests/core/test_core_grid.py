"""Grids and newline policies against loops that lay tokens out one by one."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import Grid, Plane, TokenKind, with_newlines

planes = st.builds(
    Plane, st.integers(1, 4), st.integers(1, 4), st.booleans(), prefix=st.integers(0, 2)
)
grids = st.builds(
    Grid,
    st.lists(planes, min_size=1, max_size=4).map(tuple),
    st.sampled_from(["image", "video"]),
    st.integers(0, 2),
)


def layout(grid: Grid) -> list[tuple[TokenKind, tuple[int, int, int], bool]]:
    """Kind, position and "closes the item" of every token, as a person would write them down."""
    tokens = []
    for time, plane in enumerate(grid.planes):
        tokens += [(TokenKind.CLS, (time, 0, 0), False)] * plane.prefix
        for y in range(plane.height):
            for x in range(plane.width):
                tokens.append((TokenKind.PATCH, (time, y, x), False))
            if plane.row_newline:
                tokens.append((TokenKind.NEWLINE, (time, y, plane.width), False))
    last = grid.planes[-1]
    end = (len(grid.planes) - 1, last.height - 1, last.width)
    return tokens + [(TokenKind.NEWLINE, end, True)] * grid.newlines_at_end


@given(grids)
def test_tables_are_what_a_loop_writes(grid: Grid) -> None:
    tokens = layout(grid)
    assert grid.num_tokens == len(tokens)
    assert grid.kinds().tolist() == [kind for kind, _, _ in tokens]
    assert grid.positions().tolist() == [list(position) for _, position, _ in tokens]
    patches = [n for n, (kind, _, _) in enumerate(tokens) if kind is TokenKind.PATCH]
    assert grid.patch_index().tolist() == patches
    assert grid.num_patches == len(patches)
    assert grid.kinds().dtype == grid.positions().dtype == grid.patch_index().dtype == torch.int64


@given(grids, st.data(), st.sampled_from(["keep", "row", "end", "remove"]))
def test_newline_policies_are_what_a_loop_keeps(grid: Grid, data: st.DataObject, policy) -> None:
    tokens = layout(grid)
    choices = [n for n, (kind, _, _) in enumerate(tokens) if kind is not TokenKind.NEWLINE]
    kept = data.draw(st.lists(st.sampled_from(choices), unique=True))
    expected = set(kept)
    rows = {tokens[n][1][:2] for n in kept if tokens[n][0] is TokenKind.PATCH}
    for n, (kind, position, at_end) in enumerate(tokens):
        if kind is TokenKind.NEWLINE and (
            policy == "keep"
            or (policy == "end" and at_end)
            or (policy == "row" and (at_end or position[:2] in rows))
        ):
            expected.add(n)
    out = with_newlines(torch.tensor(kept, dtype=torch.long), grid, policy)
    assert out.dtype == torch.int64 and out.tolist() == sorted(expected)


def test_newline_policy_errors() -> None:
    grid = Grid.image(2, 2)
    with pytest.raises(ValueError, match=r'"keep", "row", "end" or "remove", got \'drop\''):
        with_newlines(torch.tensor([0]), grid, "drop")
    for wrong in (torch.tensor([]), torch.tensor([True, False]), torch.tensor([[0]])):
        with pytest.raises(ValueError, match="takes indices"):
            with_newlines(wrong, grid)


class TestCache:
    def test_what_callers_do_to_a_table_stays_with_them(self) -> None:
        grid = Grid.video(2, 2, 2, newlines_at_end=1)
        before = grid.positions().tolist(), grid.kinds().tolist(), grid.patch_index().tolist()
        grid.positions().zero_()
        grid.kinds().fill_(7)
        grid.patch_index().fill_(7)
        assert (
            grid.positions().tolist(),
            grid.kinds().tolist(),
            grid.patch_index().tolist(),
        ) == before

    def test_the_table_does_not_depend_on_who_makes_it_first(self) -> None:
        grid = Grid.image(2, 2)
        with torch.device("meta"), torch.inference_mode():
            assert grid.positions().device.type == "cpu"
        index = grid.patch_index()
        x = torch.randn(4, 3, requires_grad=True)
        (x[index] * grid.kinds()[:, None]).sum().backward()
        assert x.grad is not None

    def test_grids_are_values(self) -> None:
        one, two = Grid.video(2, 3, 4), Grid.video(2, 3, 4)
        one.positions()
        assert one == two and hash(one) == hash(two)
        assert pickle.loads(pickle.dumps(one)) == two


class TestShapes:
    def test_shortcuts(self) -> None:
        options = {"row_newline": True, "prefix": 1, "newlines_at_end": 2}
        plane = Plane(2, 3, row_newline=True, prefix=1)
        assert Grid.image(2, 3, **options) == Grid((plane,), "image", 2)
        assert Grid.video(4, 2, 3, **options) == Grid((plane,) * 4, "video", 2)

    def test_uniform_grids_have_a_shape(self) -> None:
        assert Grid.video(4, 2, 3).shape == (4, 2, 3)
        mixed = Grid((Plane(2, 3), Plane(4, 4), Plane(2, 3)))
        assert not mixed.is_uniform
        with pytest.raises(ValueError, match=r"\[\(2, 3\), \(4, 4\)\]; read `planes`"):
            _ = mixed.shape

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Plane(0, 3), r"got 0 x 3 with prefix 0"),
            (lambda: Plane(2, -1), "height >= 1, width >= 1"),
            (lambda: Plane(2, 2, prefix=-1), "prefix -1"),
            (lambda: Grid(()), "at least one plane"),
            (lambda: Grid.video(0, 2, 2), "at least one plane"),
            (lambda: Grid((Plane(1, 1),), "audio"), '"image" or "video", got \'audio\''),
            (lambda: Grid.image(1, 1, newlines_at_end=-1), "newlines_at_end must be >= 0, got -1"),
        ],
    )
    def test_errors(self, make, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()
