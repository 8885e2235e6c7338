"""FlowCut against the official code: scores and counts of a block, a whole encoder, the LLM cut."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from foveate import ops
from foveate.attach.encoder import EncoderRun, EncoderStage
from foveate.core import AttentionView, Budget, DecoderContext, Tokens
from foveate.methods.flowcut import FlowCut, encoder_flow, prompt_flow
from foveate.models.tower import build_tower

from .golden_cases import Case, cases

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def encoder_of(case: Case) -> CLIPVisionModel:
    """The case's encoder, whose first block gets the case's input."""
    args = case.args
    config = CLIPVisionConfig(
        hidden_size=args["dim"],
        intermediate_size=args["mlp_ratio"] * args["dim"],
        num_hidden_layers=args["layers"],
        num_attention_heads=args["heads"],
        image_size=8,
        patch_size=4,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    model = CLIPVisionModel(config).eval()
    weights: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in case.tensors.items():
        if key.startswith("w/"):
            _, block, name = key.split("/")
            weights.setdefault(int(block), {})[name] = value
    tower = build_tower(model)
    for block, state in weights.items():
        tower.blocks[block].load_state_dict(state)
    norm = next(m for name, m in model.named_modules() if name.endswith("pre_layrnorm"))
    norm.register_forward_hook(lambda module, args, output: case["input"])
    return model


def run_of(case: Case) -> tuple[EncoderRun, list[torch.Tensor]]:
    """What the method did in the encoder, and the output of every block."""
    model = encoder_of(case)
    tower = build_tower(model, feature_layer=-2)
    runs: list[EncoderRun] = []
    outputs: list[torch.Tensor] = []
    budget = Budget(tokens=case.args["target"])
    steps = [(0, FlowCut(batch_max=True))]
    stage = EncoderStage(tower, steps, lambda index: budget, False, runs.append)
    stage.install([])
    for block in tower.blocks:
        block.register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(torch.zeros(len(case["input"]), 3, 8, 8))
    return runs[0], outputs


@cases("flowcut", "features")
def test_encoder(case: Case) -> None:
    run, outputs = run_of(case)
    assert [out.shape[1] for out in outputs] == case["tokens_after_layer"].tolist()
    # Every block after a cut ran on what was left.
    assert run.lengths == run.attention_lengths
    assert run.lengths == [case["input"].shape[1], *(out.shape[1] for out in outputs[:-1])]
    assert run.reduction is not None
    assert (run.reduction.anchor_BM[:, 1:] - 1).equal(case["keep"])
    torch.testing.assert_close(outputs[-2], case["features"], **CLOSE)


@cases("flowcut", "l0_score")
def test_block(case: Case) -> None:
    model = encoder_of(case)
    block = build_tower(model).blocks[0]
    with torch.no_grad():
        x_BMD = block.layer_norm1(case["input"])
        q, k, v = (
            getattr(block.self_attn, f"{name}_proj")(x_BMD)
            .unflatten(-1, (case.args["heads"], -1))
            .transpose(1, 2)
            for name in "qkv"
        )
    attention_BP, flow_BP = encoder_flow(q, k, v, num_prefix=1, has_cls=True)
    torch.testing.assert_close(attention_BP, case["l0_cls_attn"], **CLOSE)
    torch.testing.assert_close(flow_BP, case["l0_score"], **CLOSE)
    torch.testing.assert_close(v.mean(1)[:, 1:], case["l0_value"], **CLOSE)
    semantic_BP = ops.attention_rows(v[:, :, :1], v, scale=1.0).mean(1)[:, 0, 1:]
    torch.testing.assert_close(semantic_BP, case["l0_semantic"], **CLOSE)
    B, P = attention_BP.shape
    num_B, target_B = torch.tensor([P] * B), torch.tensor([case.args["target"]] * B)
    share_BP = attention_BP / attention_BP.sum(1, keepdim=True)
    focus_B = ops.concentration(share_BP, num_B)
    for remaining, stored in case.args["l0_prune_num_for_rpl"].items():
        drop_B = ops.cut_towards(num_B, target_B, int(remaining), focus_B)
        assert int(drop_B.max()) == stored


@cases("flowcut", "llm_score")
def test_cut_in_the_language_model(case: Case) -> None:
    q_Hd, k_HNd, v_HNd, own_Hd = (case[f"llm_{name}"] for name in ("q", "k", "v", "text_v"))
    N, scale = k_HNd.shape[1], q_Hd.shape[-1] ** -0.5
    score_N = prompt_flow(q_Hd[:, None], k_HNd, own_Hd[:, None], v_HNd, scale)
    torch.testing.assert_close(score_N, case["llm_score"], **CLOSE)
    # The same through the public stage: the visual tokens, and the last token behind them.
    q_1HSd = torch.zeros(1, *k_HNd.shape).index_fill(2, torch.tensor([0]), 7.0)
    view = AttentionView(
        torch.cat([q_1HSd, q_Hd[None, :, None]], dim=2),
        torch.cat([k_HNd, 9 * k_HNd[:, :1]], dim=1)[None],
        scale,
        torch.arange(N),
        torch.cat([v_HNd, own_Hd[:, None]], dim=1)[None],
    )
    context = DecoderContext(
        Budget(tokens=case.args["llm_target"]),
        layer=2,
        num_layers=32,
        num_visual=N,
        num_text=1,
        visual_N=torch.arange(N),
        attention=lambda layer: view,
        survivors=lambda layer: torch.arange(N + 1),
        stages=("decoder",),
    )
    reduction = FlowCut().decoder(Tokens(torch.zeros(1, N, 4)), context)
    assert reduction is not None
    assert reduction.anchor_BM[0].tolist() == case["llm_keep"].tolist()
