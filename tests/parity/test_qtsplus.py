"""QTSplus against the official code: relevance, budget, choice, re-encoding, thresholds, costs."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from foveate.core import Budget, Grid, ProjectorContext, Tokens
from foveate.methods._qtsplus_gate import budget_losses, solve_threshold
from foveate.methods._qtsplus_modules import QueryGate, entropy
from foveate.methods.qtsplus import QTSplus

from .golden_cases import Case, cases

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def gate_of(case: Case, **more: object) -> QueryGate:
    own = {name.removeprefix("w/"): x for name, x in case.tensors.items() if name.startswith("w/")}
    args = case.args
    gate = QueryGate.from_tensors(
        own,
        head_dim=args["d_model"] // args["n_heads"],
        rho=(args["rho_min"], args["rho_max"]),
        most=args["nmax"],
        tau=args["tau_s"],
        **more,
    )
    layers = (len(gate.scoring_layers), len(gate.reencode_layers))
    assert layers == (args["scoring_layers"], args["reencode_layers"] * args["reencode"])
    assert gate.scoring_layers[0].kv_heads == args["n_kv_heads"]
    return gate


@cases("qtsplus", "X", "Q", "r", "p", "entropy", "rho", "n")
def test_scores_and_budget(case: Case) -> None:
    gate = gate_of(case)
    with torch.no_grad():
        r_BM, rho_B, num_B = gate.score(case["X"], case["Q"])
    torch.testing.assert_close(r_BM, case["r"], **CLOSE)
    torch.testing.assert_close(r_BM / r_BM.sum(1, keepdim=True), case["p"], **CLOSE)
    torch.testing.assert_close(entropy(r_BM), case["entropy"], **CLOSE)
    torch.testing.assert_close(rho_B, case["rho"], **CLOSE)
    assert gate.count(rho_B, num_B).tolist() == case["n"].tolist()


@cases("qtsplus", "X", "Q", "indices_0", "Z_0")
def test_choice_and_reencoding(case: Case) -> None:
    with torch.no_grad():
        gated = gate_of(case)(case["X"], case["Q"])
    for sample, index_n in case.numbered("indices_"):
        mask_n = gated.mask_Bn[sample]
        assert gated.index_Bn[sample, mask_n].tolist() == index_n.tolist()
        torch.testing.assert_close(gated.x_BnD[sample, mask_n], case[f"Z_{sample}"], **CLOSE)


@cases("qtsplus", "r", "rho", "t_newton", "t_bisect")
def test_thresholds(case: Case) -> None:
    r_BM, tau, steps = case["r"], case.args["tau_s"], case.args["threshold_iters"]
    count_B = case["rho"] * r_BM.shape[1]
    for solver in ("newton", "bisection"):
        got_B = solve_threshold(r_BM, count_B, tau, solver=solver, iterations=steps)
        stored = case[f"t_{solver.removesuffix('ion')}"]
        torch.testing.assert_close(got_B, stored, **CLOSE)
    torch.testing.assert_close(solve_threshold(r_BM, count_B, tau), case["t_newton"], **CLOSE)


@cases("qtsplus", "rho", "X", "flops_proxy", "kv_proxy")
def test_costs(case: Case) -> None:
    num_B = torch.full_like(case["rho"], case["X"].shape[1])
    losses = budget_losses(case["rho"], num_B, case.args["nmax"])
    torch.testing.assert_close(losses["flops"], case["flops_proxy"][0], **CLOSE)
    torch.testing.assert_close(losses["kv"], case["kv_proxy"][0], **CLOSE)


@cases("qtsplus", "X", "Q", "indices_0", "Z_0")
def test_the_method_from_a_file(case: Case, tmp_path) -> None:
    """The same tokens through the projector stage, a sample at a time, weights under a prefix."""
    path, args = tmp_path / "gate.safetensors", case.args
    save_file(
        {f"model.gate.{n[2:]}": x for n, x in case.tensors.items() if n.startswith("w/")}, path
    )
    method = QTSplus(
        str(path),
        head_dim=args["d_model"] // args["n_heads"],
        rho_min=args["rho_min"],
        rho_max=args["rho_max"],
        n_max=args["nmax"],
    )
    grid = Grid.video(case["X"].shape[1] // 4, 2, 2)
    published = Budget(retain=method.card.retain, published=True)
    for sample, index_n in case.numbered("indices_"):
        tokens = Tokens.from_grid(case["X"][sample], grid)
        context = ProjectorContext(
            published, grid=grid, read={"text.segment": case["Q"][sample : sample + 1]}.get
        )
        with torch.no_grad():
            reduction = method.projector(tokens, context)
        assert reduction is not None and reduction.anchor_BM[0].tolist() == index_n.tolist()
        got_nD = tokens.reduce(reduction).x_BND[0]
        torch.testing.assert_close(got_nD, case[f"Z_{sample}"], **CLOSE)
        assert reduction.num_out <= method.count(grid, published).tokens
