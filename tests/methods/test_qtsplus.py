"""QTSplus: relevance, how many stay, the gate of its training, padding, weights and a needle."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from foveate import ops
from foveate.core import Budget, Grid, ProjectorContext, Reduction, TokenKind
from foveate.methods._qtsplus_gate import budget_losses, sample_gate, solve_threshold
from foveate.methods._qtsplus_modules import (
    BudgetHead,
    QueryGate,
    QueryLayer,
    entropy,
    time_embedding,
)
from foveate.methods.qtsplus import QTSplus, plain_relevance

from .helpers import LAYOUTS, item

D = 16
PUBLISHED = Budget(retain=QTSplus.card.retain, published=True)


def make(seed: int = 0, **options: object) -> QueryGate:
    torch.manual_seed(seed)
    options = {"scoring_layers": 1, "reencode_layers": 1, "most": 40, **options}
    return QueryGate(D, heads=4, kv_heads=2, **options).eval()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weights(tmp_path) -> str:
    path = tmp_path / "gate.safetensors"
    save_file({f"model.qts.{k}": v for k, v in make().state_dict().items()}, path)
    return str(path)


def run(
    method: QTSplus,
    grid: Grid = LAYOUTS["video"],
    budget: Budget | None = None,
    question_1SD: torch.Tensor | None = None,
    **more: object,
) -> Reduction:
    question_1SD = drawn(1, 5, D, seed=3) if question_1SD is None else question_1SD
    context = ProjectorContext(
        budget or Budget(retain=0.3), grid=grid, read={"text.segment": question_1SD}.get
    )
    with torch.no_grad():
        reduction = method.projector(item(grid, **more), context)
    assert reduction is not None
    return reduction


# -- without weights ------------------------------------------------------------------------------


def test_needle_without_weights() -> None:
    """A patch equal to a question token is kept at any budget, wherever it is."""
    grid, tokens = LAYOUTS["video"], item(LAYOUTS["video"])
    for needle in (0, 77, 209):
        question_1SD = torch.cat(
            [drawn(1, 4, D, seed=9), 3 * tokens.x_BND[:, needle : needle + 1]], 1
        )
        kept = run(QTSplus(), grid, Budget(tokens=5), question_1SD).anchor_BM[0].tolist()
        assert needle in kept and len(kept) == 5


def test_plain_relevance_is_the_largest_softmax_of_scaled_cosines() -> None:
    x_1PD, question_1SD = 5 * drawn(1, 30, D), 0.1 * drawn(1, 6, D, seed=1)
    logits_1SP = D**0.5 * ops.cosine_similarity_matrix(question_1SD, x_1PD)
    expected_1P = torch.softmax(logits_1SP, -1).amax(1)
    torch.testing.assert_close(plain_relevance(x_1PD, question_1SD), expected_1P, atol=1e-4, rtol=0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    moved_1P = plain_relevance(x_1PD[:, order], question_1SD)
    torch.testing.assert_close(moved_1P, plain_relevance(x_1PD, question_1SD)[:, order])


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_and_special_tokens(name) -> None:
    grid = LAYOUTS[name]
    for budget in (Budget(retain=0.1), Budget(tokens=7)):
        reduction, counted = run(QTSplus(), grid, budget), QTSplus().count(grid, budget)
        kinds_M = grid.kinds()[reduction.anchor_BM[0]]
        assert (kinds_M == TokenKind.PATCH).sum() == max(1, budget.count(grid.num_patches))
        assert reduction.num_out <= counted.tokens
        assert (reduction.anchor_BM[0].diff() > 0).all()


# -- the trained gate -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_grouped_attention_without_positions(dtype) -> None:
    torch.manual_seed(0)
    layer = QueryLayer(D, heads=4, kv_heads=2).to(dtype)
    q_BLD, x_BMD = drawn(2, 3, D).to(dtype), drawn(2, 7, D, seed=1).to(dtype)
    mask_BM = torch.ones(2, 7, dtype=torch.bool)
    mask_BM[1, 4:] = False
    with torch.no_grad():
        got = layer(q_BLD, x_BMD, mask_BM)
        normed = layer.kv_norm(x_BMD)
        q = layer.q_proj(layer.q_norm(q_BLD)).view(2, 3, 4, 4).transpose(1, 2)
        k, v = (
            project(normed).view(2, 7, 2, 4).transpose(1, 2).repeat_interleave(2, 1)
            for project in (layer.k_proj, layer.v_proj)
        )
        logits = (q @ k.mT / 2).masked_fill(~mask_BM[:, None, None], -torch.inf)
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        middle = q_BLD + layer.o_proj(out)
        expected = middle + layer.ffn.net(layer.ffn_norm(middle))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_permuting_tokens_permutes_relevance() -> None:
    gate, x_BMD, question_BLD = make(scoring_layers=2), drawn(2, 20, D), drawn(2, 4, D, seed=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        r_BM, rho_B, _ = gate.score(x_BMD, question_BLD)
        moved_BM, moved_rho_B, _ = gate.score(x_BMD[:, order], question_BLD)
    torch.testing.assert_close(moved_BM, r_BM[:, order], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(moved_rho_B, rho_B)


def test_length_reaches_the_budget_only_by_three_numbers() -> None:
    torch.manual_seed(0)
    head, question_BD = BudgetHead(D), drawn(1, D)
    r_BM = torch.rand(1, 9, generator=torch.Generator().manual_seed(0))
    padded_BM = torch.nn.functional.pad(r_BM, (0, 50))
    torch.testing.assert_close(
        head(question_BD, r_BM, torch.tensor([9])), head(question_BD, padded_BM, torch.tensor([9]))
    )
    assert head(question_BD, r_BM, torch.tensor([900])) != head(
        question_BD, r_BM, torch.tensor([9])
    )
    wild = head(1e3 * drawn(64, D), torch.rand(64, 9), torch.full((64,), 9))
    assert bool(((wild >= 0.05) & (wild <= 0.5)).all())
    torch.testing.assert_close(entropy(torch.ones(1, 8)), torch.tensor([8.0]).log())


def test_kept_tokens_are_the_best_in_order_and_within_bounds() -> None:
    gate, question_BLD = make(most=6), drawn(3, 4, D, seed=1)
    for M in (1, 2, 19, 60):
        with torch.no_grad():
            gated = gate(drawn(3, M, D), question_BLD)
        for sample in range(3):
            kept_n = gated.index_Bn[sample][gated.mask_Bn[sample]]
            assert 1 <= len(kept_n) <= min(6, M) and (kept_n.diff() > 0).all()
            r_M = gated.relevance_BM[sample]
            assert kept_n.equal(ops.top_k(r_M, len(kept_n)))


def test_padding_does_not_leak() -> None:
    """Samples of unequal length and unequal numbers of kept tokens give what each gives alone."""
    gate = make(scoring_layers=2, reencode_layers=2)
    lengths, words = (31, 9, 20), (5, 2, 4)
    x_BMD, question_BLD = drawn(3, 31, D), drawn(3, 5, D, seed=1)
    mask_BM = torch.arange(31) < torch.tensor(lengths)[:, None]
    words_BL = torch.arange(5) < torch.tensor(words)[:, None]
    with torch.no_grad():
        together = gate(x_BMD, question_BLD, mask_BM, words_BL)
        other = gate(
            x_BMD.masked_fill(~mask_BM[..., None], 1e3),
            question_BLD.masked_fill(~words_BL[..., None], 1e3),
            mask_BM,
            words_BL,
        )
        torch.testing.assert_close(together.x_BnD, other.x_BnD, atol=1e-5, rtol=0)
        assert len(set(together.mask_Bn.sum(1).tolist())) > 1
        for sample, (M, L) in enumerate(zip(lengths, words, strict=True)):
            alone = gate(x_BMD[sample : sample + 1, :M], question_BLD[sample : sample + 1, :L])
            real_n = together.mask_Bn[sample]
            assert together.index_Bn[sample, real_n].equal(alone.index_Bn[0])
            torch.testing.assert_close(
                together.x_BnD[sample, real_n], alone.x_BnD[0], atol=1e-5, rtol=0
            )
            assert (together.x_BnD[sample, ~real_n] == 0).all()


# -- the gate of the training ---------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("solver", ["implicit", "bisection"])
def test_threshold_meets_the_count(tau, solver) -> None:
    """Skewed relevance, a few large values among many small ones, and padding."""
    r_BM = torch.rand(4, 200, generator=torch.Generator().manual_seed(0)) ** 8
    mask_BM = torch.ones(4, 200, dtype=torch.bool)
    mask_BM[1, 50:] = False
    num_B = mask_BM.sum(1)
    for rho in (0.05, 0.3, 0.5, 0.95):
        t_B = solve_threshold(r_BM, rho * num_B, tau, mask_BM, solver)
        open_B = (torch.sigmoid((r_BM - t_B[:, None]) / tau) * mask_BM).sum(1)
        torch.testing.assert_close(open_B, rho * num_B, rtol=0.01, atol=0)


def test_the_released_solver_runs_away_where_ours_holds() -> None:
    r_BM = torch.rand(4, 200, generator=torch.Generator().manual_seed(0)) ** 8
    count_B = torch.full((4,), 10.0)
    open_B = {}
    for solver in ("newton", "implicit"):
        t_B = solve_threshold(r_BM, count_B, 0.005, solver=solver)
        open_B[solver] = torch.sigmoid((r_BM - t_B[:, None]) / 0.005).sum(1)
    torch.testing.assert_close(open_B["implicit"], count_B, rtol=0.01, atol=0)
    assert float((open_B["newton"] - count_B).abs().max()) > 5


def test_between_two_clusters_any_threshold_will_do_but_not_outside() -> None:
    r_BM = torch.cat([torch.zeros(1, 97), torch.ones(1, 3)], 1).requires_grad_(True)
    t_B = solve_threshold(r_BM, torch.tensor([3.0]), 0.005)
    assert 0 < float(t_B.detach()) < 1
    (grad,) = torch.autograd.grad(t_B.sum(), r_BM)
    assert bool(grad.isfinite().all())


def test_the_gradient_of_the_threshold_is_exact() -> None:
    r_BM = torch.rand(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    count_B = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    r_BM.requires_grad_(True)

    def solve(r_BM: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
        return solve_threshold(r_BM, count_B, 0.1, iterations=60)

    torch.autograd.gradcheck(solve, (r_BM, count_B), atol=1e-4)


def test_sampling_keeps_as_many_as_asked_and_the_released_form_more() -> None:
    r_BM = 0.3 * torch.rand(1, 4000, generator=torch.Generator().manual_seed(0))
    tau, target = 0.05, 0.2
    t_B = solve_threshold(r_BM, torch.tensor([target * 4000]), tau)
    rates = [
        float(
            sample_gate(
                r_BM, t_B, tau, generator=torch.Generator().manual_seed(1), released=form
            ).mean()
        )
        for form in (False, True)
    ]
    assert abs(rates[0] - target) < 0.02
    assert rates[1] > 2 * target


def test_gates_are_hard_forward_and_soft_backward_and_never_empty() -> None:
    r_BM = torch.rand(2, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask_BM = torch.ones(2, 9, dtype=torch.bool)
    mask_BM[1, 4:] = False
    shut_B = torch.full((2,), 50.0)
    gate_BM = sample_gate(r_BM, shut_B, 0.1, mask_BM, torch.Generator().manual_seed(0))
    assert gate_BM.unique().tolist() == [0.0, 1.0] and gate_BM.sum(1).tolist() == [1.0, 1.0]
    best = r_BM.detach().masked_fill(~mask_BM, -1.0).argmax(1)
    assert gate_BM.argmax(1).equal(best)
    t_B = solve_threshold(r_BM.detach(), torch.tensor([4.0, 2.0]), 0.1, mask_BM)
    gate_BM = sample_gate(r_BM, t_B, 0.1, mask_BM, torch.Generator().manual_seed(0))
    (gate_BM * drawn(2, 9)).sum().backward()
    assert (r_BM.grad[mask_BM] != 0).all() and (r_BM.grad[~mask_BM] == 0).all()
    assert (gate_BM[~mask_BM] == 0).all()


def test_training_reaches_every_part_and_can_learn_to_keep_less() -> None:
    gate, x_BMD, question_BLD = make().train(), drawn(2, 30, D), drawn(2, 4, D, seed=1)
    gated = gate(x_BMD, question_BLD, generator=torch.Generator().manual_seed(0))
    (gated.x_BnD * drawn(*gated.x_BnD.shape, seed=2)).sum().backward()
    silent = {name for name, p in gate.named_parameters() if p.grad is None or not p.grad.any()}
    # The last scoring layer is read for its attention alone.
    last = "scoring_layers.0."
    assert silent == {
        *(last + part for part in ("v_proj.weight", "v_proj.bias", "o_proj.weight")),
        *(last + part for part in ("ffn_norm.weight", "ffn.net.0.weight", "ffn.net.0.bias")),
        *(last + part for part in ("ffn.net.2.weight", "ffn.net.2.bias")),
        # All keys moved alike change no softmax, but for rounding.
        *({last + "k_proj.bias"} & silent),
    }
    optimiser = torch.optim.Adam(gate.budget.parameters(), 0.01)
    asked = []
    for _ in range(30):
        optimiser.zero_grad()
        _, rho_B, num_B = gate.score(x_BMD, question_BLD)
        losses = budget_losses(rho_B, num_B, gate.most, mean_rho=0.3)
        (losses["flops"] + 1.7 * losses["kv"] + 0.05 * losses["smooth"]).backward()
        optimiser.step()
        asked.append(float(rho_B.detach().mean()))
    assert asked[-1] < asked[0] - 0.05


def test_losses() -> None:
    losses = budget_losses(torch.tensor([0.5, 0.25]), torch.tensor([100, 200]), 50, 0.5)
    assert {name: round(float(x), 6) for name, x in losses.items()} == {
        "flops": 1.0,
        "kv": 1.0,
        "smooth": 0.03125,
    }
    assert set(budget_losses(torch.ones(1), torch.ones(1), 1)) == {"flops", "kv"}


def test_times_are_told_apart_when_asked() -> None:
    gate, x_BnD = make(), drawn(1, 6, D)
    time_Bn = torch.tensor([[0, 0, 1, 1, 2, 2]])
    with torch.no_grad():
        assert not torch.allclose(gate.reencode(x_BnD), gate.reencode(x_BnD, time_Bn=time_Bn))
    embedded = time_embedding(time_Bn, 5)
    assert embedded.shape == (1, 6, 5) and embedded[0, 0].equal(embedded[0, 1])
    assert not embedded[0, 1].equal(embedded[0, 2])


# -- weights from a file --------------------------------------------------------------------------


def test_the_budget_head_decides_unless_the_call_has_a_budget(weights) -> None:
    grid, method = LAYOUTS["video"], QTSplus(weights, head_dim=4, n_max=33)
    decided = run(method, grid, PUBLISHED)
    with torch.no_grad():
        gate = make(most=33)
        _, rho_1, num_1 = gate.score(item(grid).x_BND, drawn(1, 5, D, seed=3))
    assert decided.num_out == int(gate.count(rho_1, num_1)) <= method.count(grid, PUBLISHED).tokens
    assert not method.count(grid, PUBLISHED).exact
    for keep in (5, 100):
        assert run(method, grid, Budget(tokens=keep)).num_out == keep


@pytest.mark.parametrize("name", LAYOUTS)
def test_special_tokens_are_not_reencoded(name, weights) -> None:
    grid, method = LAYOUTS[name], QTSplus(weights, head_dim=4)
    tokens, reduction = item(grid), run(method, grid)
    assert reduction.kind == "synthesise"
    plain = run(QTSplus(weights, head_dim=4, reencode=False), grid)
    assert plain.kind == "select" and plain.anchor_BM.equal(reduction.anchor_BM)
    kept_M = reduction.anchor_BM[0]
    is_patch_M = grid.kinds()[kept_M] == TokenKind.PATCH
    made_MD, was_MD = reduction.features_BMD[0], tokens.x_BND[0, kept_M]
    assert made_MD[~is_patch_M].equal(was_MD[~is_patch_M])
    assert not torch.isclose(made_MD[is_patch_M], was_MD[is_patch_M]).all(1).any()
    with torch.no_grad():
        expected = make().reencode(was_MD[is_patch_M][None])[0]
    torch.testing.assert_close(made_MD[is_patch_M], expected, atol=1e-6, rtol=1e-5)
    assert reduction.apply(tokens.x_BND)[0].equal(was_MD), "what travels along is selected"


def test_half_precision_weights_follow_the_features(weights) -> None:
    grid = LAYOUTS["video"]
    tokens = type(item(grid)).from_grid(item(grid).x_BND.bfloat16(), grid)
    context = ProjectorContext(PUBLISHED, grid=grid, read={"text.segment": drawn(1, 5, D)}.get)
    with torch.no_grad():
        reduction = QTSplus(weights, head_dim=4).projector(tokens, context)
    assert reduction is not None and reduction.features_BMD.dtype == torch.bfloat16
    assert bool(reduction.features_BMD.isfinite().all())
    gate = QTSplus(weights, head_dim=4)._gate(tokens.x_BND)
    assert gate.scoring_layers[0].q_proj.weight.dtype == torch.bfloat16
    assert gate.budget.mlp[0].weight.equal(make().budget.mlp[0].weight), "not rounded"


def test_a_rewritten_file_is_read_again(weights) -> None:
    method = QTSplus(weights, head_dim=4)
    before = run(method).features_BMD
    save_file(make(seed=1).state_dict(), weights)
    os.utime(weights, ns=(1, 1))  # clocks may be coarse
    assert not run(method).features_BMD.equal(before)


def test_bad_weights(weights, tmp_path) -> None:
    missing = QTSplus(str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="there is no file"):
        missing.check(4, 4)
    with pytest.raises(ValueError, match="there is no file"):
        run(missing)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a header")
    with pytest.raises(ValueError, match="no safetensors file"):
        run(QTSplus(str(broken)))
    with pytest.raises(ValueError, match="head_dim = 5 must divide"):
        run(QTSplus(weights, head_dim=5))
    with pytest.raises(ValueError, match="of width 16; this model's have 24"):
        run(QTSplus(weights, head_dim=4), channels=24)
    state = make().state_dict()
    with pytest.raises(ValueError, match="under some prefix"):
        QueryGate.from_tensors({"model.q_proj.weight": torch.zeros(2, 2)})
    for lost in ("scoring_layers.0.k_proj.weight", "budget.mlp.2.bias"):
        with pytest.raises(ValueError, match="no weights of QTSplus"):
            QueryGate.from_tensors({k: v for k, v in state.items() if k != lost}, head_dim=4)
    extra = {**state, "lm_head.weight": torch.zeros(1)}
    assert QueryGate.from_tensors(extra, head_dim=4).width == D


def test_bad_arguments() -> None:
    for wrong, match in (
        ({"rho_min": 0.0}, "rho_min and rho_max"),
        ({"rho_min": 0.6}, "rho_min and rho_max"),
        ({"n_max": 0}, "n_max and head_dim"),
        ({"head_dim": 0}, "n_max and head_dim"),
        ({"time": True}, "time=True"),
    ):
        with pytest.raises(ValueError, match=match):
            QTSplus(**wrong)
    with pytest.raises(ValueError, match="heads must divide"):
        QueryLayer(10, 4, 2)
    with pytest.raises(ValueError, match="needs a scoring layer"):
        QueryGate(8, 2, 1, scoring_layers=0)
    with pytest.raises(ValueError, match="rho must be"):
        QueryGate(8, 2, 1, rho=(0.5, 0.1))
    with pytest.raises(ValueError, match="solver must be"):
        solve_threshold(torch.ones(1, 2), torch.ones(1), 0.1, solver="secant")
