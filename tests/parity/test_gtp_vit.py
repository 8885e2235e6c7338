"""GTP-ViT against the official code."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, layer_norm, linear

from foveate.core import Budget, EncoderContext, Tokens
from foveate.methods.gtp_vit import GTPViT, importance, spatial_graph, token_graph

from .golden_cases import Case, cases

SCORES = {
    "MixedAttnMax": "mixed_max",
    "MixedAttnMean": "mixed_mean",
    "CLSAttnMax": "cls_max",
    "CLSAttnMean": "cls_mean",
    "IMGAttnMax": "received_max",
    "IMGAttnMean": "received_mean",
    "DiagAttnMax": "diagonal_max",
    "DiagAttnMean": "diagonal_mean",
    "CosSim": "similarity",
}


def _prefix(case: Case) -> int:
    return int(case.args["cls_token"])


def _method(case: Case) -> GTPViT:
    args = case.args
    return GTPViT(
        graph=args["graph_type"].lower(),
        neighbours=args["num_neighbours"],
        alpha=args["alpha"],
        keep_attention=args["sparsity"],
        score=SCORES[args["selection"]],
        token_scale=args["token_scale"],
    )


@cases("gtp_vit", "x", "spatial_graph", "graph0")
def test_graph(case: Case) -> None:
    plane, prefix = tuple(case.args["grid"]), _prefix(case)
    assert spatial_graph(*plane).equal(case["spatial_graph"])
    method = _method(case)
    graph_BPP = token_graph(case["x"][:, prefix:], plane, method.graph, method.neighbours)
    torch.testing.assert_close(graph_BPP, case["graph0"], atol=1e-6, rtol=1e-5)


@cases("gtp_vit", "attn0", "kept0", "prop0")
def test_selection(case: Case) -> None:
    prefix, num_prop = _prefix(case), case.args["num_prop"]
    score_BP = importance(case["attn0"], SCORES[case.args["selection"]], prefix)
    order_BP = score_BP.argsort(dim=1, descending=True, stable=True) + prefix
    kept_BK, prop_BR = order_BP[:, :-num_prop], order_BP[:, -num_prop:]
    assert kept_BK.sort(1).values.equal(case["kept0"].sort(1).values)
    assert prop_BR.sort(1).values.equal(case["prop0"].sort(1).values)


@cases("gtp_vit", "x", "x_final", "w0.attn.qkv.weight")
def test_blocks(case: Case) -> None:
    """Two blocks of a vision transformer with the method's hooks called by hand."""
    args, prefix, method = case.args, _prefix(case), _method(case)
    B, N, C = case["x"].shape
    depth, heads, num_prop = args["depth"], args["heads"], args["num_prop"]
    state: dict = {}
    tokens = Tokens(case["x"])
    where_BM = torch.arange(N).expand(B, N)  # place of every present token in the golden's order
    for layer in range(depth):

        def weight(name: str, layer: int = layer) -> torch.Tensor:
            return case[f"w{layer}.{name}"]

        def norm(x: torch.Tensor, name: str, weight=weight) -> torch.Tensor:
            scale, shift = weight(f"{name}.weight"), weight(f"{name}.bias")
            return layer_norm(x, (C,), scale, shift, args["ln_eps"])

        x = tokens.x_BND
        qkv = linear(norm(x, "norm1"), weight("attn.qkv.weight"), weight("attn.qkv.bias"))
        q, k, v = qkv.view(B, -1, 3, heads, C // heads).permute(2, 0, 3, 1, 4).unbind()
        budget = Budget(tokens=N - prefix - depth * num_prop)
        more = {"num_prefix": prefix, "plane": tuple(args["grid"]), "state": state}
        more |= {"layer": layer, "num_layers": depth}
        method.encoder(tokens, EncoderContext(budget, point="block_start", **more))
        size_BN = tokens.size_BN if args["token_scale"] else None
        context = EncoderContext(
            budget, queries_BHNd=q, keys_BHNd=k, values_BHNd=v, size_BN=size_BN, **more
        )
        out = method.encoder_attention(context)
        if out is None:
            bias = None if size_BN is None else size_BN.log()[:, None, None]
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2)
        x = x + linear(out, weight("attn.proj.weight"), weight("attn.proj.bias"))
        tokens = Tokens(x, size_BN=tokens.size_BN)
        reduction = method.encoder(tokens, context)
        assert reduction is not None
        tokens = tokens.reduce(reduction)
        x = tokens.x_BND
        hidden = gelu(linear(norm(x, "norm2"), weight("mlp.fc1.weight"), weight("mlp.fc1.bias")))
        x = x + linear(hidden, weight("mlp.fc2.weight"), weight("mlp.fc2.bias"))
        tokens = Tokens(x, size_BN=tokens.size_BN)
        # The official order: [CLS], then by falling importance.
        own_B = torch.arange(prefix).expand(B, prefix)
        golden_BM = torch.cat([own_B, case[f"kept{layer}"]], dim=1)
        kept_BM = where_BM.gather(1, reduction.anchor_BM)
        slot_BM = (kept_BM[..., None] == golden_BM[:, None]).float().argmax(-1)
        assert golden_BM.gather(1, slot_BM).equal(kept_BM)
        where_BM = slot_BM
        expected = case[f"x{layer}"].gather(1, slot_BM[..., None].expand(-1, -1, C))
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
        if f"scales{layer}" in case:
            assert tokens.size_BN is not None
            torch.testing.assert_close(
                tokens.size_BN, case[f"scales{layer}"].gather(1, slot_BM), atol=1e-5, rtol=1e-5
            )
    expected = case["x_final"].gather(1, where_BM[..., None].expand(-1, -1, C))
    torch.testing.assert_close(tokens.x_BND, expected, atol=1e-4, rtol=1e-4)
