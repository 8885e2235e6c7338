"""TempMe against the official blocks: in a transformers CLIP that carries their weights.

Legend: I images, L tokens of a row, D channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import foveate
from foveate.core import Budget
from foveate.methods.tempme import TempMe

from .golden_cases import Case, cases


def _method(case: Case, weights: str | None = None) -> TempMe:
    args = case.args
    return TempMe(
        r=args["tome_r"],
        clip=args["R_clip_removed"],
        intra=args["R_intra_removed"],
        layers=tuple(args["merge_layers"]),
        factors=tuple(args["merge_frames"]),
        prop_attn=args["prop_attn"],
        clip_frames=args["frames"],
        weights=weights,
    )


def _model(case: Case) -> CLIPVisionModel:
    """As many blocks as there are, with their weights; what comes before them does not matter."""
    args, width = case.args, case["x"].shape[2]
    assert args["act"] == "quick_gelu"
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(args["schedule"]),
        num_attention_heads=args["heads"],
        image_size=4,
        patch_size=2,
        layer_norm_eps=args["ln_eps"],
    )
    model = CLIPVisionModel(config).eval()
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1"}
    names |= {"mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}
    state = {}
    for layer in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                state[f"{layer}.{ours}.{kind}"] = case[f"w{layer}.{theirs}.{kind}"]
            for name, part in zip(
                "qkv", case[f"w{layer}.attn.in_proj_{kind}"].chunk(3), strict=True
            ):
                state[f"{layer}.self_attn.{name}_proj.{kind}"] = part
    _blocks(model).load_state_dict(state)
    return model


def _blocks(model: CLIPVisionModel) -> torch.nn.ModuleList:
    return next(m for n, m in model.named_modules() if n.endswith("encoder.layers"))


@cases("tempme", "x", "x0", "cls_out")
def test_schedule(case: Case) -> None:
    args, patches = case.args, case["x"].shape[1] - 1
    budget = Budget(retain=0.5, published=True)
    steps = _method(case).schedule(args["frames"], patches, len(args["schedule"]), budget)
    for step, entry in zip(steps, args["schedule"], strict=True):
        assert step.clips == entry["M_frame_num"]
        counts = [step.within] if step.clips == 1 else [step.across, step.within]
        assert counts == entry["M_token_num"]


@cases("tempme", "x", "x0", "cls_out")
def test_blocks(case: Case, tmp_path: Path) -> None:
    """Merging, low-rank updates and clip embeddings, through hooks on an unmodified model."""
    path = tmp_path / "tempme.safetensors"
    trained = {name: x.contiguous() for name, x in case.tensors.items() if "TVPt" in name}
    save_file(trained, path)
    model, args = _model(case), case.args
    outputs: list[torch.Tensor] = []

    def enter(module, arguments, keywords):
        return (case["x"], *arguments[1:]), keywords

    blocks = _blocks(model)
    blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    images = torch.zeros(case["x"].shape[0], 3, 4, 4)
    budget = {"tokens": None, "retain": None}  # the published one
    with torch.no_grad(), foveate.reduce(model, _method(case, str(path)), **budget) as run:
        for block in blocks:
            block.register_forward_hook(
                lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
            )
        short = model(images).last_hidden_state
    torch.testing.assert_close(short, case[f"x{len(blocks) - 1}"], atol=1e-4, rtol=1e-4)
    for layer, out in enumerate(outputs):
        torch.testing.assert_close(out, case[f"x{layer}"], atol=1e-4, rtol=1e-4)
        assert out.shape[1] == args["schedule"][layer]["tokens"]
    reduction = run.encoder_reduction
    assert reduction is not None
    size_RL = reduction.sizes(torch.ones(reduction.batch, reduction.num_in))
    torch.testing.assert_close(size_RL, case[f"size{len(blocks) - 1}"][..., 0])
    # Each frame's [CLS] comes back in its place.
    with torch.no_grad(), foveate.reduce(model, _method(case, str(path)), restore=True):
        full = model(images).last_hidden_state
    assert full.shape == case["x"].shape
    torch.testing.assert_close(
        full[:, 0].view(case["cls_out"].shape), case["cls_out"], atol=1e-4, rtol=1e-4
    )
