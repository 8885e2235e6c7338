"""The FLOPs rule: papers' printed figures, invariants, torch's counter on a hand-built block."""

from __future__ import annotations

from math import ceil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.flops import (
    EncoderDims,
    FlopsBreakdown,
    ProjectorDims,
    TransformerDims,
    decode_flops,
    encoder_flops,
    encoder_segments,
    prefill_flops,
    projector_flops,
    published_flops,
)

QWEN2_7B = TransformerDims(28, 3584, 28, 4, 128, 18944, vocab=152064)
SMALL = TransformerDims(3, 8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=11)
VIT = EncoderDims(3, 8, heads=2, head_dim=4, intermediate=16, patch_inputs=12)
LENGTHS = st.lists(st.integers(0, 500), min_size=3, max_size=3)


def tera(flops: float, digits: int = 1) -> float:
    return round(flops / 1e12, digits)


class TestPublishedFigures:
    """Figures as the papers print them."""

    @pytest.mark.parametrize(
        ("retain", "outer", "with_inner"),
        [(0.25, 8.7, 7.1), (0.20, 7.0, 5.8), (0.15, 5.2, 4.3), (0.10, 3.4, 2.8)],
    )
    def test_holitom_on_llava_onevision_7b(
        self, retain: float, outer: float, with_inner: float
    ) -> None:
        tokens = 32 * ceil(196 * retain)
        per_layer = [tokens] * 18 + [tokens // 2] * 10
        assert tera(published_flops(28, 3584, 18944, tokens)) == outer
        assert tera(published_flops(28, 3584, 18944, per_layer)) == with_inner

    def test_holitom_untouched_models(self) -> None:
        assert tera(published_flops(28, 3584, 18944, 32 * 196)) == 40.8
        assert tera(published_flops(80, 8192, 29568, 32 * 196)) == 429.3
        assert tera(published_flops(28, 3584, 18944, 64 * 169)) == 80.2

    def test_holitom_on_the_larger_model_and_the_longer_video(self) -> None:
        tokens = 32 * ceil(196 * 0.15)
        assert tera(published_flops(80, 8192, 29568, [tokens] * 60 + [tokens // 2] * 20)) == 51.6
        tokens = 64 * ceil(169 * 0.15)
        assert tera(published_flops(28, 3584, 18944, tokens)) == 9.3
        assert tera(published_flops(28, 3584, 18944, [tokens] * 18 + [tokens // 2] * 10)) == 7.6

    def test_divprune_on_llava_1_5(self) -> None:
        # The paper averages over tasks whose questions differ in length. The first figure fixes
        # that average; the three others then have to follow from 576 -> 56 visual tokens.
        def average(layers: int, d: int, m: int, visual: int, share: float) -> float:
            short = published_flops(layers, d, m, visual + 45)
            long = published_flops(layers, d, m, visual + 46)
            return (1 - share) * short + share * long

        short, long = (published_flops(32, 4096, 11008, 576 + text) for text in (45, 46))
        share = (3.228e12 - short) / (long - short)
        assert 0 < share < 1
        assert tera(average(32, 4096, 11008, 56, share), 3) == 0.512
        assert tera(average(40, 5120, 13824, 576, share), 3) == 6.281
        assert tera(average(40, 5120, 13824, 56, share), 3) == 1.002

    def test_divprune_on_video(self) -> None:
        # 8 frames x 144 tokens, of which a tenth stays: 1152 -> 115.
        short, long = (published_flops(32, 4096, 11008, 1152 + text) for text in (69, 70))
        share = (6.539e12 - short) / (long - short)
        assert 0 < share < 1
        short, long = (published_flops(32, 4096, 11008, 115 + text) for text in (69, 70))
        assert tera((1 - share) * short + share * long, 3) == 0.937

    def test_aim_counts_by_our_rule(self) -> None:
        # AIM's figures come from a tool that counts a multiply-add twice and knows grouped-query
        # attention and gated MLPs, as we do: 99.63 untouched, 14.67 reduced, 100 text tokens.
        untouched = prefill_flops(QWEN2_7B, 32 * 196 + 100)
        retain = [1.0] * 14 + [max(0.0, 1 - 0.125 * (layer + 1)) for layer in range(14)]
        reduced = prefill_flops(QWEN2_7B, [int(32 * 49 * share) + 100 for share in retain])
        assert untouched == pytest.approx(99.63e12, rel=0.01)
        assert reduced == pytest.approx(14.67e12, rel=0.01)

    def test_the_two_conventions_on_llava_onevision_7b(self) -> None:
        # The pair of figures in docs/flops.md.
        assert tera(published_flops(28, 3584, 18944, 6272)) == 40.8
        assert tera(prefill_flops(QWEN2_7B, 6272)) == 97.6

    def test_our_rule_is_twice_the_published_one_without_gqa_and_gate(self) -> None:
        dims = TransformerDims(
            5, 64, heads=4, kv_heads=4, head_dim=16, intermediate=96, gated=False
        )
        lengths = [50, 40, 30, 20, 0]
        assert prefill_flops(dims, lengths) == 2 * published_flops(5, 64, 96, lengths)


class TestPrefillAndDecode:
    @given(LENGTHS)
    def test_an_int_is_the_same_number_in_every_layer(self, lengths: list[int]) -> None:
        first = lengths[0]
        assert prefill_flops(SMALL, first) == prefill_flops(SMALL, [first] * 3)
        assert decode_flops(SMALL, first, 2) == decode_flops(SMALL, [first] * 3, 2)

    @given(LENGTHS, st.integers(0, 20))
    def test_decoding_is_one_token_prefills_on_a_growing_cache(
        self, lengths: list[int], steps: int
    ) -> None:
        one_by_one = sum(
            prefill_flops(SMALL, 1, [length + step for length in lengths])
            for step in range(1, steps + 1)
        )
        assert decode_flops(SMALL, lengths, steps) == one_by_one

    @given(LENGTHS, st.integers(0, 2))
    def test_fewer_tokens_never_cost_more(self, lengths: list[int], layer: int) -> None:
        fewer = [n // 2 if index == layer else n for index, n in enumerate(lengths)]
        assert prefill_flops(SMALL, fewer) <= prefill_flops(SMALL, lengths)
        assert decode_flops(SMALL, fewer, 3) <= decode_flops(SMALL, lengths, 3)

    def test_a_chunked_prefill_costs_the_pairs_it_skips_less(self) -> None:
        # The first chunk does not see the keys of the second: 4 x 6 pairs per layer less.
        whole = prefill_flops(SMALL, 10, logits_for=0)
        chunks = prefill_flops(SMALL, 4, logits_for=0) + prefill_flops(SMALL, 6, 10, logits_for=0)
        assert whole - chunks == 3 * SMALL.attention_pair * 4 * 6

    def test_logits(self) -> None:
        assert prefill_flops(SMALL, 10, logits_for=10) - prefill_flops(SMALL, 10) == 9 * 2 * 8 * 11
        headless = TransformerDims(3, 8, 2, 1, 4, 16)
        assert prefill_flops(headless, 10) == prefill_flops(SMALL, 10, logits_for=0)

    def test_bad_lengths_are_refused(self) -> None:
        with pytest.raises(ValueError, match="one number per layer: 3, got 2"):
            prefill_flops(SMALL, [1, 2])
        with pytest.raises(ValueError, match="kv_lengths must be >= 0, got -1"):
            decode_flops(SMALL, [4, 4, -1], 1)
        with pytest.raises(ValueError, match="num_new_tokens must be >= 0"):
            decode_flops(SMALL, 4, -1)
        with pytest.raises(ValueError, match=r"TransformerDims.heads must be >= 1, got 0"):
            TransformerDims(3, 8, heads=0, kv_heads=1, head_dim=4, intermediate=16)


class TestEncoderAndProjector:
    def test_a_merging_block_counts_as_torch_counts_it(self) -> None:
        # ToMe merges between attention and MLP, so the two see different numbers of tokens.
        dims = EncoderDims(3, 192, heads=3, head_dim=64, intermediate=768, patch_inputs=768)
        merged, tokens, patches = 13, 197, 196
        attention_lengths, mlp_lengths = [], []
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            weight = torch.empty(192, 192)
            F.linear(torch.empty(2, patches, 768), torch.empty(192, 768))
            x_BND = torch.empty(2, tokens, 192)
            for _ in range(dims.num_blocks):
                attention_lengths.append(x_BND.shape[1])
                heads = F.linear(x_BND, weight).unflatten(-1, (3, 64)).transpose(1, 2)
                F.linear(x_BND, weight), F.linear(x_BND, weight)
                mixed = F.scaled_dot_product_attention(heads, heads, heads)
                x_BND = F.linear(mixed.transpose(1, 2).flatten(2), weight)[:, merged:]
                mlp_lengths.append(x_BND.shape[1])
                x_BND = F.linear(F.linear(x_BND, torch.empty(768, 192)), torch.empty(192, 768))
        assert mlp_lengths == [184, 171, 158]
        ours = encoder_flops(
            dims, attention_lengths, 2, mlp_lengths=mlp_lengths, num_patches=patches
        )
        assert ours == counter.get_total_flops()

    def test_segments_save_attention_alone(self) -> None:
        saved = encoder_flops(VIT, 12) - encoder_flops(VIT, [(4, 8), 12, (12,)])
        assert saved == VIT.attention_pair * (12 * 12 - 4 * 4 - 8 * 8)

    @given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20))
    def test_windows_cover_every_patch_once(self, frames: int, rows: int, columns: int) -> None:
        dims = EncoderDims(3, 8, 2, 4, 16, 12, window=8, full_blocks=(1,))
        windows, full, last = encoder_segments(dims, [(frames, 2 * rows, 2 * columns), (1, 8, 8)])
        patches = frames * 4 * rows * columns + 64
        assert sum(windows) == sum(full) == patches
        assert windows == last
        assert max(windows) <= 64
        assert len(full) == frames + 1

    def test_without_windows_every_frame_attends_to_itself(self) -> None:
        assert encoder_segments(VIT, [(2, 4, 6), (1, 2, 2)]) == [(24, 24, 4)] * 3

    def test_attention_pooling_is_added(self) -> None:
        pooled = EncoderDims(3, 8, 2, 4, 16, 12, attention_pool=True)
        # q and output for one token, k and v for ten, scores and values, two-matrix MLP
        expected = 2 * 64 * 2 + 2 * 64 * 20 + 4 * 8 * 10 + 4 * 8 * 16
        assert encoder_flops(pooled, 10) - encoder_flops(VIT, 10) == expected

    def test_bad_counts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="one number per layer: 3, got 1"):
            encoder_flops(VIT, [(4, 4)])
        with pytest.raises(ValueError, match="10 encoder tokens do not divide into rows of 4"):
            projector_flops(ProjectorDims(((32, 16),), tokens_factor=4), 10)


class TestBreakdown:
    def test_totals_and_sums(self) -> None:
        one = FlopsBreakdown(encoder=1, projector=2, prefill=3, decode=4)
        assert one.total == 10
        assert (one + one).as_dict() == {
            "encoder": 2,
            "projector": 4,
            "prefill": 6,
            "decode": 8,
            "total": 20,
        }

    def test_ratio_is_the_share_that_is_left(self) -> None:
        full = FlopsBreakdown(encoder=10, prefill=80, decode=10)
        reduced = FlopsBreakdown(encoder=10, prefill=8, decode=7)
        assert reduced.ratio(full) == 0.25
        assert reduced.ratio(full, "prefill") == 0.1
        assert full.ratio(full) == reduced.ratio(full, "projector") == 1.0

    def test_comparing_different_inputs_is_refused(self) -> None:
        with pytest.raises(ValueError, match="0 FLOPs in stage 'decode'"):
            FlopsBreakdown(decode=5).ratio(FlopsBreakdown(prefill=5), "decode")
        with pytest.raises(ValueError, match="stage must be one of encoder"):
            FlopsBreakdown().ratio(FlopsBreakdown(), "cache")  # type: ignore[arg-type]
