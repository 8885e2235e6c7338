"""Reduction as a matrix: every action agrees with the dense W, composed, batched and ragged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import Reduction

KINDS = ("select", "merge", "transform", "sparse")


def random_mask(generator: torch.Generator, batch: int, num: int) -> torch.Tensor:
    return torch.rand(batch, num, generator=generator) < 0.7


def make(kind: str, batch: int, num_in: int, num_out: int, seed: int, ragged: bool) -> Reduction:
    """A random reduction; weights are small powers of two, so that float32 sums are exact."""
    g = torch.Generator().manual_seed(seed)
    mask_BM = random_mask(g, batch, num_out) if ragged else None
    if kind == "select":
        if num_in == 0:
            mask_BM = torch.zeros(batch, num_out, dtype=torch.bool)
        index_BM = torch.randint(0, max(num_in, 1), (batch, num_out), generator=g)
        return Reduction.select(index_BM, num_in, mask_BM)
    if kind == "merge":
        assignment_BN = torch.randint(-1, num_out, (batch, num_in), generator=g)
        if mask_BM is None:
            mask_BM = torch.ones(batch, num_out, dtype=torch.bool)
        weight_BN = 2.0 ** torch.randint(-2, 2, (batch, num_in), generator=g)
        return Reduction.merge(
            assignment_BN, num_out, weight_BN, mask_BM=mask_BM, normalise=seed % 2 == 0
        )
    matrix_BMN = torch.randint(-2, 3, (batch, num_out, num_in), generator=g).float() / 2
    if kind == "sparse":
        matrix_BMN = matrix_BMN.to_sparse()
    return Reduction.transform(matrix_BMN, mask_BM=mask_BM)


@st.composite
def reductions(draw: st.DrawFn, batch: int | None = None, num_in: int | None = None) -> Reduction:
    batch = draw(st.integers(1, 3)) if batch is None else batch
    num_in = draw(st.integers(0, 6)) if num_in is None else num_in
    return make(
        draw(st.sampled_from(KINDS)),
        batch,
        num_in,
        draw(st.integers(0, 6)),
        draw(st.integers(0, 10_000)),
        draw(st.booleans()),
    )


@st.composite
def chains(draw: st.DrawFn, length: int) -> list[Reduction]:
    steps = [draw(reductions())]
    for _ in range(length - 1):
        steps.append(draw(reductions(steps[-1].batch, steps[-1].num_out)))
    return steps


def features(r: Reduction, *channels: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (r.batch, r.num_in, *channels), generator=g).float()


def exists(r: Reduction) -> torch.Tensor:
    return torch.ones_like(r.anchor_BM, dtype=torch.bool) if r.mask_BM is None else r.mask_BM


class TestOne:
    @given(reductions(), st.sampled_from([(), (3,), (2, 3)]))
    def test_apply_is_the_product_with_the_matrix(self, r: Reduction, channels: tuple) -> None:
        x_BN = features(r, *channels)
        expected = torch.bmm(
            r.matrix(),
            x_BN.reshape(r.batch, r.num_in, -1)
            if x_BN.numel()
            else x_BN.new_zeros(r.batch, r.num_in, 1),
        )
        expected = expected.expand(-1, -1, max(1, torch.Size(channels).numel()))
        out = r.apply(x_BN)
        assert out.shape == (r.batch, r.num_out, *channels) and out.dtype == x_BN.dtype
        torch.testing.assert_close(out, expected.reshape(out.shape))

    @given(reductions())
    def test_the_matrix_is_what_apply_does_to_unit_vectors(self, r: Reduction) -> None:
        eye = torch.eye(r.num_in).expand(r.batch, -1, -1)
        torch.testing.assert_close(r.apply(eye), r.matrix())

    @given(reductions())
    def test_padding_has_no_anchor_no_features_and_no_sources(self, r: Reduction) -> None:
        padding_BM = ~exists(r)
        assert r.counts_B.tolist() == exists(r).sum(1).tolist()
        assert bool((r.anchor_BM[padding_BM] == -1).all())
        assert not r.matrix()[padding_BM].any()
        assert not r.apply(features(r, 2))[padding_BM].any()
        held = r.groups_BN
        for sample in range(r.batch):
            padded = padding_BM[sample].nonzero()[:, 0].tolist()
            assert not set(padded) & set(held[sample].tolist())

    @given(reductions())
    def test_groups_name_a_target_that_the_source_feeds(self, r: Reduction) -> None:
        W = r.matrix()
        for sample in range(r.batch):
            for source, target in enumerate(r.groups_BN[sample].tolist()):
                column = W[sample, :, source].abs()
                if target == -1:
                    assert not column.any()
                else:
                    # The strongest target, the first of equally strong ones.
                    assert column[target] == column.max() > 0
                    assert not (column[:target] == column.max()).any()

    @given(reductions())
    def test_gather_reads_anchors_and_fills_the_rest(self, r: Reduction) -> None:
        ids_BN = torch.arange(r.num_in).expand(r.batch, -1)
        expected = torch.where(r.anchor_BM >= 0, r.anchor_BM, 99)
        assert torch.equal(r.gather(ids_BN, 99), expected)
        position = torch.stack([ids_BN, -ids_BN], dim=-1)
        picked = r.gather(position, -7)
        assert torch.equal(picked[..., 0], torch.where(r.anchor_BM >= 0, r.anchor_BM, -7))
        assert torch.equal(picked[..., 1], torch.where(r.anchor_BM >= 0, -r.anchor_BM, -7))

    @given(reductions())
    def test_sample_is_the_batch_without_its_padding(self, r: Reduction) -> None:
        x_BN3, size_BN = features(r, 3), features(r).abs() + 1
        for index in range(r.batch):
            one = r.sample(index)
            keep = exists(r)[index]
            assert one.batch == 1 and one.mask_BM is None and one.num_in == r.num_in
            assert torch.equal(one.matrix()[0], r.matrix()[index][keep])
            row = slice(index, index + 1)
            torch.testing.assert_close(one.apply(x_BN3[row])[0], r.apply(x_BN3)[index][keep])
            assert torch.equal(one.anchor_BM[0], r.anchor_BM[index][keep])
            torch.testing.assert_close(one.sizes(size_BN[row])[0], r.sizes(size_BN)[index][keep])
            y_BM3 = r.apply(x_BN3)
            torch.testing.assert_close(
                one.restore(y_BM3[row][:, keep], fill=5.0)[0], r.restore(y_BM3, fill=5.0)[index]
            )

    @given(reductions())
    def test_moving_to_the_same_device_changes_nothing(self, r: Reduction) -> None:
        assert torch.equal(r.to("cpu").matrix(), r.matrix())
        assert r.to("cpu").kind == r.kind

    def test_defaults_of_merge(self) -> None:
        r = Reduction.merge(torch.tensor([[1, 1, 0, -1, 1]]), num_out=2)
        assert r.anchor_BM.tolist() == [[2, 0]], "the first source of each target"
        assert r.matrix().tolist() == [
            [[0, 0, 1, 0, 0], pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 3])]
        ]

    def test_defaults_of_transform(self) -> None:
        matrix = torch.tensor([[0.2, 0.5, 0.5], [0.0, 0.0, 0.0], [0.1, -0.9, 0.2]])
        for form in (matrix, matrix.to_sparse()):
            r = Reduction.transform(form)
            assert r.anchor_BM.tolist() == [[1, -1, 1]]
            assert r.groups_BN.tolist() == [[0, 2, 0]]

    def test_repr_is_one_line(self) -> None:
        assert repr(Reduction.identity(4, batch=2)) == "Reduction(select, 2 x (4 -> 4))"
        ragged = Reduction.select(torch.tensor([[0, 1], [1, -1]]), 4)
        assert repr(ragged) == "Reduction(select, 2 x (4 -> 2), padded)"


class TestIdentity:
    @pytest.mark.parametrize(("num", "batch"), [(0, 1), (1, 1), (5, 3)])
    def test_identity(self, num: int, batch: int) -> None:
        r = Reduction.identity(num, batch)
        x = features(r, 2)
        assert r.is_identity
        assert torch.equal(r.apply(x), x) and torch.equal(r.restore(x), x)
        assert r.counts_B.tolist() == [num] * batch
        assert Reduction.select(torch.arange(num).expand(batch, -1), num).is_identity

    @pytest.mark.parametrize("index", [[0, 2, 1], [0, 1], [0, 1, 2, 2], [0, 0, 2]])
    def test_what_is_not_the_identity(self, index: list[int]) -> None:
        assert not Reduction.select(torch.tensor(index), 3).is_identity

    def test_a_merge_or_padding_is_not_the_identity(self) -> None:
        assert not Reduction.merge(torch.arange(3), 3).is_identity
        assert not Reduction.select(torch.tensor([[0, 1], [0, -1]]), 2).is_identity
        mask = torch.tensor([[True, True], [True, False]])
        assert not Reduction.select(torch.tensor([[0, 1], [0, 1]]), 2, mask).is_identity


class TestThen:
    @given(chains(2))
    def test_composing_is_multiplying_matrices(self, steps: list[Reduction]) -> None:
        first, second = steps
        both = first.then(second)
        x = features(first, 3)
        hidden = ~exists(both)
        expected = torch.bmm(second.matrix(), first.matrix())
        expected[hidden] = 0.0
        torch.testing.assert_close(both.matrix(), expected)
        one_by_one = second.apply(first.apply(x))
        one_by_one[hidden] = 0.0
        torch.testing.assert_close(both.apply(x), one_by_one)
        assert (both.num_in, both.num_out) == (first.num_in, second.num_out)

    @given(chains(2))
    def test_anchors_compose(self, steps: list[Reduction]) -> None:
        first, second = steps
        ids = torch.arange(first.num_in).expand(first.batch, -1)
        both = first.then(second)
        one_by_one = second.gather(first.gather(ids, -1), -1)
        assert torch.equal(both.gather(ids, -1), one_by_one)

    @given(chains(2))
    def test_groups_compose_where_sources_feed_one_target(self, steps: list[Reduction]) -> None:
        first, second = steps
        both = first.then(second)
        if both.kind != "merge":
            return
        for sample in range(first.batch):
            for source, middle in enumerate(first.groups_BN[sample].tolist()):
                target = -1 if middle == -1 else int(second.groups_BN[sample, middle])
                if target != -1 and not exists(both)[sample, target]:
                    target = -1
                assert both.groups_BN[sample, source] == target

    @given(chains(3))
    def test_composition_is_associative(self, steps: list[Reduction]) -> None:
        a, b, c = steps
        left, right = a.then(b).then(c), a.then(b.then(c))
        torch.testing.assert_close(left.matrix(), right.matrix())
        assert torch.equal(left.anchor_BM, right.anchor_BM)
        assert torch.equal(exists(left), exists(right))

    @given(reductions())
    def test_identity_is_neutral(self, r: Reduction) -> None:
        before, after = (Reduction.identity(n, r.batch) for n in (r.num_in, r.num_out))
        for composed in (before.then(r), r.then(after)):
            assert torch.equal(composed.matrix(), r.matrix())
            assert torch.equal(composed.anchor_BM, r.anchor_BM)
            assert torch.equal(composed.groups_BN, r.groups_BN)

    def test_selects_and_merges_stay_cheap(self) -> None:
        merge = Reduction.merge(torch.tensor([0, 0, 1, 1]), 2)
        pick, swap = Reduction.select(torch.tensor([1]), 2), Reduction.select(torch.arange(4), 4)
        assert merge.then(pick).kind == swap.then(merge).kind == "merge"
        assert swap.then(swap).kind == "select"
        assert merge.then(Reduction.transform(torch.ones(1, 2))).kind == "transform"

    def test_copies_of_a_merged_token_all_hold_it(self) -> None:
        merge = Reduction.merge(torch.tensor([0, 0, 1]), 2)
        copies = Reduction.select(torch.tensor([0, 0, 1]), 2)
        x = torch.tensor([[[1.0], [3.0], [7.0]]])
        assert merge.then(copies).apply(x).tolist() == [[[2.0], [2.0], [7.0]]]
        again = Reduction.merge(torch.tensor([0, 1, 1]), 2)
        upsampled = Reduction.select(torch.tensor([2, 2, 0]), 3).then(again)
        assert upsampled.apply(x).tolist() == [[[7.0], [4.0]]]

    def test_ends_must_meet(self) -> None:
        with pytest.raises(ValueError, match=r"1 x \(4 -> 2\) with 1 x \(3 -> 3\)"):
            Reduction.select(torch.tensor([0, 1]), 4).then(Reduction.identity(3))
        with pytest.raises(ValueError, match="counts must meet"):
            Reduction.identity(3).then(Reduction.identity(3, batch=2))


class TestRestore:
    @given(reductions())
    def test_a_dropped_source_is_filled_and_a_kept_one_copies_its_target(
        self, r: Reduction
    ) -> None:
        if r.kind not in ("select", "merge"):
            return
        y = torch.arange(1.0, r.batch * r.num_out * 2 + 1).view(r.batch, r.num_out, 2)
        out = r.restore(y, fill=-1.0)
        for sample in range(r.batch):
            for source, target in enumerate(r.groups_BN[sample].tolist()):
                expected = [-1.0, -1.0] if target == -1 else y[sample, target].tolist()
                assert out[sample, source].tolist() == expected

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 99))
    def test_piecewise_constant_input_comes_back(self, pieces: list[int], seed: int) -> None:
        _, assignment = torch.tensor(pieces).unique(return_inverse=True)
        value = torch.randn(int(assignment.max()) + 1, 3, generator=torch.manual_seed(seed))
        x = value[assignment][None]
        weight = torch.rand(len(pieces), generator=torch.manual_seed(seed)) + 0.1
        for weights in (None, weight):
            r = Reduction.merge(assignment, len(value), weights)
            torch.testing.assert_close(r.restore(r.apply(x)), x)
        dense = Reduction.transform(r.matrix())
        torch.testing.assert_close(dense.restore(dense.apply(x)), x)

    def test_a_transform_averages_the_targets_that_a_source_fed(self) -> None:
        r = Reduction.transform(torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.75, 0.0]]))
        out = r.restore(torch.tensor([[[8.0], [4.0]]]), fill=-1.0)
        assert out.tolist() == [[[8.0], [5.0], [-1.0]]]

    def test_repeated_tokens_restore_from_their_first_copy(self) -> None:
        r = Reduction.select(torch.tensor([2, 1, 2, 2]), 3)
        assert r.groups_BN.tolist() == [[-1, 1, 0]]
        assert r.restore(torch.tensor([[10.0, 11.0, 12.0, 13.0]])).tolist() == [[0, 11, 10]]

    def test_shape_is_checked(self) -> None:
        r = Reduction.select(torch.tensor([0, 1]), 4)
        with pytest.raises(ValueError, match=r"\(1, 2\) \+ channels, got \(1, 4, 3\)"):
            r.restore(torch.zeros(1, 4, 3))


class TestSizes:
    @given(reductions())
    def test_mass_of_everything_kept_once_is_conserved(self, r: Reduction) -> None:
        size_BN = features(r).abs() + 1
        kept_BN = r.groups_BN >= 0
        if r.kind == "select":
            assert torch.equal(r.sizes(size_BN), r.apply(size_BN))
        elif r.kind == "merge":
            assert torch.equal(r.sizes(size_BN).sum(1), (size_BN * kept_BN).sum(1))

    @given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
    def test_a_transform_shares_sizes_by_weight(self, num_in: int, num_out: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        matrix = torch.rand(2, num_out, num_in, generator=g) + 0.1
        size = torch.randint(1, 9, (2, num_in), generator=g)
        out = Reduction.transform(matrix).sizes(size)
        assert out.is_floating_point()
        torch.testing.assert_close(out.sum(1), size.sum(1).float())

    @given(chains(2))
    def test_sizes_compose(self, steps: list[Reduction]) -> None:
        first, second = steps
        both = first.then(second)
        if both.kind not in ("select", "merge") or first.mask_BM is not None:
            return
        size = features(first).abs() + 1
        assert torch.equal(both.sizes(size), second.sizes(first.sizes(size)))

    def test_weights_do_not_change_sizes(self) -> None:
        r = Reduction.merge(torch.tensor([0, 0, 1]), 2, torch.tensor([0.9, 0.1, 1.0]))
        assert r.sizes(torch.tensor([[2.0, 3.0, 4.0]])).tolist() == [[5.0, 4.0]]
        assert r.sizes(torch.tensor([[2, 3, 4]])).tolist() == [[5, 4]]


class TestSynthesise:
    def test_without_a_matrix_only_features_exist(self) -> None:
        r = Reduction.synthesise(torch.ones(2, 5), num_in=7)
        assert (r.batch, r.num_in, r.num_out) == (1, 7, 2)
        assert r.mask_BM is None and r.anchor_BM.tolist() == [[-1, -1]]
        assert r.groups_BN.tolist() == [[-1] * 7]
        assert r.gather(torch.arange(7)[None], -5).tolist() == [[-5, -5]]
        assert r.sizes(torch.full((1, 7), 3.0)).tolist() == [[1.0, 1.0]]
        for action in (r.apply, lambda x: r.restore(x[:, :2]), lambda x: r.matrix()):
            with pytest.raises(ValueError, match="synthesised without a matrix"):
                action(torch.zeros(1, 7, 5))

    def test_with_a_matrix_it_carries_what_is_indexed_like_the_sources(self) -> None:
        W = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
        r = Reduction.synthesise(torch.zeros(2, 4), 3, W, anchor_BM=torch.tensor([0, 2]))
        x = torch.tensor([[2.0, 4.0, 8.0]])
        assert r.apply(x).tolist() == [[3.0, 8.0]]
        assert r.groups_BN.tolist() == [[0, 0, 1]]
        assert r.gather(x).tolist() == [[2.0, 8.0]]

    @pytest.mark.parametrize("matrix", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_features_survive_composition_on_both_sides(self, kind: str, matrix: bool) -> None:
        W = torch.rand(2, 3, 5, generator=torch.manual_seed(0)) if matrix else None
        new = torch.randn(2, 3, 4, generator=torch.manual_seed(1))
        synthesised = Reduction.synthesise(new, 5, W)
        later = make(kind, 2, 3, 2, seed=4, ragged=False)
        both = synthesised.then(later)
        assert both.kind == "synthesise" and both.num_in == 5
        torch.testing.assert_close(both.features_BMD, later.apply(new))
        earlier = make(kind, 2, 6, 5, seed=4, ragged=False)
        before = earlier.then(synthesised)
        assert torch.equal(before.features_BMD, new) and before.num_in == 6
        if W is not None:
            torch.testing.assert_close(both.matrix(), later.matrix() @ W)
            torch.testing.assert_close(before.matrix(), W @ earlier.matrix())
        else:
            assert both.matrix_BMN is None and before.matrix_BMN is None

    def test_after_everything_was_dropped(self) -> None:
        none = Reduction.select(torch.empty(0, dtype=torch.long), 4)
        r = none.then(Reduction.synthesise(torch.ones(2, 3), num_in=0))
        assert (r.num_in, r.num_out) == (4, 2) and r.anchor_BM.tolist() == [[-1, -1]]

    def test_padding(self) -> None:
        mask = torch.tensor([[True, True], [True, False]])
        r = Reduction.synthesise(torch.ones(2, 2, 3), 4, mask_BM=mask)
        assert r.counts_B.tolist() == [2, 1]
        assert not r.features_BMD[1, 1].any()
        assert r.sample(1).features_BMD.shape == (1, 1, 3)
        assert r.sizes(torch.ones(2, 4)).tolist() == [[1, 1], [1, 0]]


class TestRagged:
    def test_minus_one_is_padding_in_a_batch(self) -> None:
        r = Reduction.select(torch.tensor([[0, 3], [2, -1]]), 4)
        assert r.mask_BM is not None and r.mask_BM.tolist() == [[True, True], [True, False]]
        assert Reduction.select(torch.tensor([[0, 3], [2, 1]]), 4).mask_BM is None

    def test_under_an_explicit_mask_indices_do_not_matter(self) -> None:
        mask = torch.tensor([[True, True], [True, False]])
        for junk in (-1, 0, 77):
            r = Reduction.select(torch.tensor([[0, 3], [2, junk]]), 4, mask)
            assert r.anchor_BM.tolist() == [[0, 3], [2, -1]]
            assert r.groups_BN[1].tolist() == [-1, -1, 0, -1]
        one = Reduction.select(torch.tensor([1, -1]), 4, torch.tensor([True, False]))
        assert one.counts_B.tolist() == [1]

    def test_a_single_sample_is_not_padded(self) -> None:
        with pytest.raises(ValueError, match=r"index \[1\] of 2 has no source"):
            Reduction.select(torch.tensor([1, -1]), 4)
        with pytest.raises(ValueError, match=r"target \[1\] of 3 has no source"):
            Reduction.merge(torch.tensor([0, 0, 2]), 3)

    def test_empty_targets_of_a_batched_merge_are_padding(self) -> None:
        r = Reduction.merge(torch.tensor([[0, 1, 1], [0, 0, 0]]), 2)
        assert r.mask_BM is not None and r.mask_BM.tolist() == [[True, True], [True, False]]

    def test_given_anchors_say_that_targets_exist(self) -> None:
        r = Reduction.merge(torch.tensor([0, 0, -1]), 2, anchor_BM=torch.tensor([0, 2]))
        assert r.mask_BM is None
        assert r.apply(torch.ones(1, 3)).tolist() == [[1.0, 0.0]]
        batch = Reduction.merge(torch.zeros(2, 3).long(), 2, anchor_BM=torch.tensor([[0, 1]] * 2))
        assert batch.mask_BM is None

    def test_sources_of_a_hidden_target_are_dropped(self) -> None:
        mask = torch.tensor([[True, False, True]])
        r = Reduction.merge(torch.tensor([0, 1, 2, 2]), 3, mask_BM=mask)
        assert r.groups_BN.tolist() == [[0, -1, 2, 2]]
        assert r.sample(0).groups_BN.tolist() == [[0, -1, 1, 1]]
        assert r.weight_BN.tolist() == [[1.0, 0.0, 0.5, 0.5]]

    def test_selecting_padding_gives_padding(self) -> None:
        ragged = Reduction.select(torch.tensor([[0, 3], [2, -1]]), 4)
        both = ragged.then(Reduction.select(torch.tensor([[1], [1]]), 2))
        assert both.mask_BM.tolist() == [[True], [False]]
        assert both.anchor_BM.tolist() == [[3], [-1]]


class TestEmpty:
    @pytest.mark.parametrize("batch", [1, 2])
    def test_nothing_is_selected(self, batch: int) -> None:
        r = Reduction.select(torch.empty(batch, 0, dtype=torch.long), 4)
        x = torch.ones(batch, 4, 3)
        assert r.num_out == 0 and r.counts_B.tolist() == [0] * batch
        assert r.apply(x).shape == r.gather(x).shape == (batch, 0, 3)
        assert torch.equal(r.restore(x[:, :0], fill=2.0), torch.full_like(x, 2.0))
        assert r.groups_BN.tolist() == [[-1] * 4] * batch
        assert r.sizes(x[..., 0]).shape == (batch, 0)
        assert r.matrix().shape == (batch, 0, 4)
        assert not r.is_identity

    def test_nothing_is_merged(self) -> None:
        r = Reduction.merge(torch.full((3,), -1), 0)
        assert r.apply(torch.ones(1, 3, 2)).shape == (1, 0, 2)
        assert r.restore(torch.ones(1, 0, 2)).tolist() == [[[0, 0]] * 3]

    def test_of_no_tokens(self) -> None:
        x = torch.ones(1, 0, 3)
        for r in (
            Reduction.select(torch.empty(0, dtype=torch.long), 0),
            Reduction.merge(torch.empty(0, dtype=torch.long), 0),
            Reduction.transform(torch.empty(0, 0)),
        ):
            assert r.apply(x).shape == r.restore(x).shape == (1, 0, 3)
            assert r.then(r).num_out == 0
        two = Reduction.merge(torch.empty(0, dtype=torch.long), 2, mask_BM=torch.zeros(2))
        assert not two.apply(x).any() and two.apply(x).shape == (1, 2, 3)
        assert two.gather(x, 4.0).tolist() == [[[4.0] * 3] * 2]

    def test_no_channels(self) -> None:
        r = Reduction.merge(torch.tensor([0, 0, 1]), 2)
        assert r.apply(torch.ones(1, 3, 0)).shape == (1, 2, 0)


class TestUpsampling:
    def test_more_tokens_than_before(self) -> None:
        r = Reduction.select(torch.tensor([0, 0, 1, 1, 1]), 2)
        x = torch.tensor([[[1.0], [2.0]]])
        assert r.apply(x).flatten().tolist() == [1, 1, 2, 2, 2]
        assert r.groups_BN.tolist() == [[0, 2]], "the first copy"
        assert r.matrix().sum(2).tolist() == [[1.0] * 5]
        assert r.sizes(torch.tensor([[1.0, 4.0]])).tolist() == [[1, 1, 4, 4, 4]]
        assert torch.equal(r.restore(r.apply(x)), x)


class TestNumbers:
    @given(st.integers(0, 99))
    def test_single_sources_are_copied_bit_for_bit(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 6, 5, generator=g).to(torch.bfloat16)
        order = torch.stack([torch.randperm(6, generator=g) for _ in range(2)])
        r = Reduction.merge(order, 6, weight_BN=torch.rand(2, 6, generator=g) + 0.1)
        out = r.apply(x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out.gather(1, order[..., None].expand(-1, -1, 5)), x)
        twice = r.then(r)
        assert torch.equal(twice.apply(x), r.apply(r.apply(x)))

    def test_half_precision_is_accumulated_in_float32(self) -> None:
        x = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
        total = Reduction.merge(torch.zeros(4096).long(), 1, normalise=False)
        assert total.apply(x).item() == 4096
        row = Reduction.transform(torch.ones(1, 4096, dtype=torch.bfloat16))
        assert row.apply(x).item() == 4096
        halves = torch.full((4096,), 1.0, dtype=torch.bfloat16)
        mean = Reduction.merge(torch.zeros(4096).long(), 1, halves)
        assert mean.weight_BN.dtype == torch.float32
        assert mean.apply(x).item() == 1.0

    def test_double_precision_stays(self) -> None:
        x = torch.tensor([[[1.0], [1.0 + 1e-12]]], dtype=torch.float64)
        r = Reduction.merge(torch.tensor([0, 0]), 1, torch.ones(2, dtype=torch.float64))
        assert r.apply(x).item() == pytest.approx(1 + 5e-13, abs=1e-16)
        both = Reduction.identity(2).then(r)
        assert both.apply(x).dtype == torch.float64

    def test_dropped_tokens_may_hold_anything(self) -> None:
        x = torch.tensor([[[1.0], [float("nan")], [float("inf")], [3.0]]])
        r = Reduction.merge(torch.tensor([0, -1, -1, 0]), 1)
        assert r.apply(x).item() == 2.0
        ragged = Reduction.select(torch.tensor([[3], [-1]]), 4)
        assert ragged.apply(x.expand(2, -1, -1)).flatten().tolist() == [3.0, 0.0]

    def test_a_target_of_no_weight_is_zero(self) -> None:
        r = Reduction.merge(torch.tensor([0, 0, 1]), 2, torch.tensor([0.0, 0.0, 2.0]))
        assert r.apply(torch.ones(1, 3)).tolist() == [[0.0, 1.0]]

    def test_gradients_reach_features_and_weights(self) -> None:
        x = torch.randn(1, 4, 3, requires_grad=True)
        weight = torch.rand(1, 4, requires_grad=True)
        r = Reduction.merge(torch.tensor([0, 0, 1, -1]), 2, weight)
        r.then(Reduction.select(torch.tensor([0]), 2)).apply(x).sum().backward()
        assert x.grad is not None and weight.grad is not None
        assert x.grad[0].any(dim=1).tolist() == [True, True, False, False]
        for form in (torch.eye(4), torch.eye(4).to_sparse()):
            y = torch.randn(1, 4, 3, requires_grad=True)
            Reduction.transform(form).apply(y).sum().backward()
            assert torch.equal(y.grad, torch.ones_like(y))


class TestErrors:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64])
    def test_all_integer_types_are_indices(self, dtype: torch.dtype) -> None:
        index = torch.tensor([0, 2], dtype=dtype)
        assert Reduction.select(index, 3).apply(torch.arange(3.0)[None]).tolist() == [[0, 2]]
        assert Reduction.merge(index, 3, anchor_BM=torch.tensor([0, -1, 1])).num_in == 2

    def test_a_mask_is_no_index(self) -> None:
        with pytest.raises(ValueError, match=r"bool mask of shape \(1, 3\).*nonzero"):
            Reduction.select(torch.tensor([True, False, True]), 3)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Reduction.select(torch.tensor([0.0]), 3), "integers, got torch.float32"),
            (lambda: Reduction.select([0, 1], 3), "must be a tensor .* got list"),
            (lambda: Reduction.select(torch.zeros(1, 1, 1).long(), 3), r"shape \(1, 1, 1\)"),
            (lambda: Reduction.select(torch.tensor([0, 3]), 3), r"0\.\.2 .* found 0\.\.3"),
            (lambda: Reduction.select(torch.tensor([0, -2]), 3), r"found -2\.\.0"),
            (lambda: Reduction.select(torch.tensor([0]), 0), "there are no tokens"),
            (
                lambda: Reduction.select(torch.tensor([0, 1]), 3, torch.ones(3)),
                r"masks have shape \(1, 3\), expected \(1, 2\)",
            ),
            (lambda: Reduction.merge(torch.tensor([0, 2]), 2), r"0\.\.1 .* found 0\.\.2"),
            (
                lambda: Reduction.merge(torch.tensor([0, 1]), 2, torch.ones(3)),
                r"weights have shape \(1, 3\), expected \(1, 2\)",
            ),
            (
                lambda: Reduction.merge(torch.tensor([0, 1]), 2, anchor_BM=torch.tensor([0])),
                r"anchors have shape \(1, 1\), expected \(1, 2\)",
            ),
            (
                lambda: Reduction.merge(torch.tensor([0, 1]), 2, anchor_BM=torch.tensor([0, 9])),
                r"anchor must lie in 0\.\.1",
            ),
            (lambda: Reduction.transform(torch.ones(3)), r"\[B, M, N\], got \(3,\)"),
            (
                lambda: Reduction.transform(torch.ones(2, 3), torch.tensor([0])),
                r"anchors have shape \(1, 1\), expected \(1, 2\)",
            ),
            (
                lambda: Reduction.transform(torch.ones(1, 3), torch.tensor([3])),
                r"anchor must lie in 0\.\.2",
            ),
            (lambda: Reduction.synthesise(torch.ones(3), 4), r"\[B, M, D\], got \(3,\)"),
            (
                lambda: Reduction.synthesise(torch.ones(2, 3), 4, torch.ones(2, 5)),
                r"matrices have shape \(1, 2, 5\), expected \(1, 2, 4\)",
            ),
        ],
    )
    def test_bad_input_names_shape_or_value(self, make, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    def test_actions_check_shapes(self) -> None:
        r = Reduction.select(torch.tensor([[0], [1]]), 3)
        for action in (r.apply, r.gather, r.sizes):
            with pytest.raises(ValueError, match=r"3 tokens of 2 sample\(s\).*\(1, 3\)"):
                action(torch.zeros(1, 3))
        with pytest.raises(ValueError, match="no sample 2 in a batch of 2"):
            r.sample(2)
        with pytest.raises(ValueError, match="no sample -1"):
            r.sample(-1)


class TestOtherDevices:
    """The meta device has shapes and no values: whatever reads one back fails there."""

    def index(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.long, device="meta")

    def merge(self, num_in: int, num_out: int, **given: torch.Tensor) -> Reduction:
        return Reduction.merge(self.index(2, num_in), num_out, normalise=False, **given)

    def test_nothing_waits_for_the_device(self) -> None:
        x = torch.empty(2, 6, 4, device="meta")
        one = Reduction.select(self.index(2, 5), 6)
        two = self.merge(5, 3, anchor_BM=self.index(2, 3))
        three = self.merge(3, 2)
        four = Reduction.transform(torch.empty(2, 2, 2, device="meta"))
        y = one.then(Reduction.select(self.index(2, 5), 5)).apply(x)
        assert y.shape == (2, 5, 4)
        merged = two.then(three)
        assert merged.kind == "merge" and merged.then(four).num_out == 2
        for r in (one, two, three, four, merged):
            assert r.counts_B.shape == (2,) and r.groups_BN.shape == (2, r.num_in)
            assert r.gather(torch.empty(2, r.num_in, device="meta")).shape == (2, r.num_out)
            out = torch.empty(2, r.num_out, 4, device="meta")
            assert r.restore(out).shape == (2, r.num_in, 4)
            assert r.matrix().device.type == "meta"

    def test_who_is_padded_does_not_depend_on_the_device(self) -> None:
        # On the CPU a mask that says nothing is left out; elsewhere it stays and is all True.
        assert Reduction.select(self.index(1, 5), 6).mask_BM is None
        assert Reduction.select(self.index(2, 5), 6).mask_BM.shape == (2, 5)
        assert Reduction.identity(5, 2, "meta").mask_BM is None
        assert self.merge(5, 3).mask_BM.shape == (2, 3)
        given = self.merge(5, 3, anchor_BM=self.index(2, 3))
        assert given.mask_BM is None

    def test_identity_is_looked_for_only_when_it_is_possible(self) -> None:
        assert not Reduction.select(self.index(2, 5), 6).is_identity
        assert not self.merge(6, 6).is_identity

    def test_a_mask_that_says_nothing_changes_nothing(self) -> None:
        index = torch.tensor([[0, 2], [1, 2]])
        plain = Reduction.select(index, 3)
        masked = Reduction.select(index, 3, torch.ones(2, 2, dtype=torch.bool))
        assert plain.mask_BM is None and masked.mask_BM is not None
        x = torch.randn(2, 3, 4)
        assert torch.equal(plain.apply(x), masked.apply(x))
        assert torch.equal(plain.groups_BN, masked.groups_BN)
        full = Reduction.select(torch.arange(3).expand(2, -1), 3, torch.ones(2, 3).bool())
        assert full.is_identity
