"""Video-XL-2 against the official code.

Legend: L tokens of the prompt, U units, G key heads, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.attach.unrotated import Rebuilt
from foveate.core import Budget, CacheContext
from foveate.methods.video_xl2 import VideoXL2, cache_length
from foveate.ops.blocks import block_mask

from .golden_cases import Case, cases


@dataclass
class Layout:
    """The published token layout of a case: units of timestamp and visual tokens."""

    case: Case

    def __post_init__(self) -> None:
        args = self.case.args
        first, stamp, size = (
            args[name] for name in ("visual_start", "time_tokens_per_unit", "visual_per_unit")
        )
        place_L = torch.arange(args["total_len"]) - first
        inside_L = (place_L >= 0) & (torch.arange(args["total_len"]) < args["visual_end"])
        is_visual_L = inside_L & (place_L % (stamp + size) >= stamp)
        self.visual_N = is_visual_L.nonzero()[:, 0]
        self.unit_N = place_L[self.visual_N] // (stamp + size)
        self.context = args["visual_end"]

    def method(self) -> VideoXL2:
        args = self.case.args
        chunk = args["decode_chunk_units"]
        # Retrieval numbers stretches of 8 frames, two units.
        chosen = tuple(unit // (chunk // 2) for unit in args["selected_unit_indices"])
        return VideoXL2(
            block_units=args["prefill_block_units"],
            previous_blocks=args["prev_blocks"],
            chunk_units=chunk,
            compression=args["compression"],
            chunks=chosen,
            drop_tail=True,
        )


@cases("video_xl2", "allowed", "time_start", "time_end")
def test_mask(case: Case) -> None:
    layout = Layout(case)
    starts = layout.visual_N[layout.unit_N.diff(prepend=torch.tensor([-1])) > 0]
    assert starts.tolist() == case["time_end"].tolist()
    block_L = torch.full((case.args["total_len"],), -1)
    block_L[layout.visual_N] = layout.unit_N // case.args["prefill_block_units"]
    mask_LL = block_mask(block_L, case.args["prev_blocks"])
    assert torch.equal(mask_LL.float(), case["allowed"])


@cases("video_xl2", "key_0", "mixed_key_0", "suffix_position_ids")
def test_mixed_cache(case: Case) -> None:
    layout = Layout(case)
    N = len(layout.visual_N)
    position_N3 = torch.stack([layout.unit_N, torch.zeros(N).long(), torch.arange(N)], dim=1)
    for number, key in case.numbered("key_"):
        key, value = key[None, :, : layout.context], case[f"value_{number}"][None]
        context = CacheContext(
            Budget(retain=0.5), position_N3=position_N3, item_N=torch.zeros(N).long()
        )
        seen = key[:, :, layout.visual_N]
        reduction = layout.method().cache(seen, seen, context)
        position_PC = torch.arange(layout.context)[None]
        rebuilt = Rebuilt(layout.visual_N, layout.context, reduction, position_PC, torch.tensor(0))
        for got, expected in (
            (rebuilt.take(key)[0], case[f"mixed_key_{number}"]),
            (rebuilt.take(value[:, :, : layout.context])[0], case[f"mixed_value_{number}"]),
        ):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
        # Timestamps, the prefix and dense units are the very numbers.
        place_M = rebuilt.slot_M
        is_text_M = ~torch.isin(place_M, layout.visual_N)
        assert torch.equal(rebuilt.take(key)[:, :, is_text_M], key[:, :, place_M[is_text_M]])
        assert case["suffix_position_ids"][0, 0] == rebuilt.length
        assert rebuilt.position_PM[0].tolist() == list(range(rebuilt.length))


@cases("video_xl2", "mixed_key_0")
def test_count_formula(case: Case) -> None:
    args, method = case.args, Layout(case).method()
    sizes = [args["visual_per_unit"]] * args["units"]
    dense = method.dense_units(sizes, Budget(retain=0.5))
    text = args["visual_start"] + args["units"] * args["time_tokens_per_unit"]
    count = cache_length(sizes, dense, args["compression"], text)
    assert count == case["mixed_key_0"].shape[1]
