"""VideoScan against the official code."""

from __future__ import annotations

import torch

from foveate.methods.videoscan import (
    CarrierMemory,
    frame_carriers,
    kept_slots,
    most_redundant,
    pick_frame_tokens,
    stage2_allow,
)

from .golden_cases import Case, cases


@cases("videoscan", "frame_tokens", "carriers")
def test_carriers(case: Case) -> None:
    assert frame_carriers(case["frame_tokens"]).equal(case["carriers"])


@cases("videoscan", "carriers", "drop_pos", "memory", "memory_frame_idx")
def test_memory(case: Case) -> None:
    memory = CarrierMemory(case.args["capacity"])
    frames: list[int] = []
    for frame, carrier in enumerate(case["carriers"]):
        frames.append(frame)
        before = torch.stack([case["carriers"][i] for i in frames])
        dropped = memory.add(carrier)
        if frame:
            assert (-1 if dropped is None else dropped) == case["drop_pos"][frame - 1]
        if dropped is not None:
            assert most_redundant(before) == dropped
            del frames[dropped]
    assert frames == case["memory_frame_idx"].tolist()
    assert memory.carriers_MD.equal(case["memory"])


@cases("videoscan", "frame_tokens", "memory_frame_idx")
def test_memory_of_one_group(case: Case) -> None:
    # All frames at once must be decided as one after the other.
    frames, size, channels = case["frame_tokens"].shape
    frame_L = torch.arange(frames).repeat_interleave(size)
    memory = CarrierMemory(case.args["capacity"])
    step = memory.push(case["frame_tokens"].reshape(-1, channels), frame_L, frames)
    assert step.remains_K.tolist() == case["memory_frame_idx"].tolist()
    assert step.frame_L.equal(torch.arange(frames).repeat_interleave(size + 1))
    assert torch.allclose(step.x_LD[step.kept_L], case["carriers"], atol=1e-6)


@cases("videoscan", "stage2_allow")
def test_stage2_mask(case: Case) -> None:
    args = case.args
    allowed = stage2_allow(
        args["system_len"], args["mask_frames"], args["tokens_per_frame"], args["text_len"]
    )
    assert allowed.long().equal(case["stage2_allow"])


@cases("videoscan", "kv_in", "kv_out", "kv_out_drop2")
def test_kept_cache(case: Case) -> None:
    args = case.args
    kept = kept_slots(args["system_len"], args["past_carriers"], args["tokens_per_frame"])
    assert case["kv_in"][..., kept, :].equal(case["kv_out"])
    dropped = args["system_len"] + 2
    kept = torch.cat([kept[:dropped], kept[dropped + 1 :]])
    assert case["kv_in"][..., kept, :].equal(case["kv_out_drop2"])


@cases("videoscan", "plus_kv_in", "plus_attn", "plus_kv_out")
def test_kept_cache_plus(case: Case) -> None:
    args = case.args
    system, size, add = args["system_len"], args["tokens_per_frame"], args["add_kv"]
    past = args["past_carriers"] * (1 + add)
    frame = slice(system + past, system + past + size)
    for layer, attention_1HQT in enumerate(case["plus_attn"]):
        picked = pick_frame_tokens(attention_1HQT[0, :, size, frame], add)
        kept = kept_slots(system, past, size, picked.tolist())
        assert case["plus_kv_in"][layer][..., kept, :].equal(case["plus_kv_out"][layer])
