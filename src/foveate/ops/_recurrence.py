"""Linear recurrences that know their own gradients: the same recurrences, run backwards.

Legend of shape suffixes: L steps, T = L - 1 of them behind the first, C chunks of c steps, B batch,
E inner channels, S states of a channel.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

#: Numbers of a step from which a loop on the CPU beats chunks, of a recurrence alone and of a scan
#: that calls several operations a step (benchmarks/test_recurrence_forms.py).
_LOOP_FROM, _SCAN_FROM = 512, 2048


class Recurrence(Function):
    """`h_0 = x_0`, `h_t = d_(t-1) h_(t-1) + x_t`; reversed, from the last step to the first.

    The gradient of x is the reversed recurrence of the gradient of h under the same decays, so
    that derivatives of every order exist and nothing but h is kept.
    """

    @staticmethod
    def forward(decay_T: Tensor, input_L: Tensor, backwards: bool) -> Tensor:
        """States [L, ...] from decays [L - 1, ...] between steps and inputs [L, ...], L > 0."""
        # A loop touches every number once and inside the caches, but calls an operation a step.
        if input_L.device.type == "cpu" and input_L[0].numel() >= _LOOP_FROM:
            return _in_a_loop(decay_T, input_L, backwards)
        if backwards:
            return _in_chunks(decay_T.flip(0), input_L.flip(0)).flip(0)
        return _in_chunks(decay_T, input_L)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep decays and states."""
        ctx.save_for_backward(inputs[0], output)
        ctx.backwards = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """The adjoint states, and their products with the states they meet."""
        (grad_L,) = grad_outputs
        decay_T, state_L = ctx.saved_tensors
        adjoint_L = recur(decay_T.conj().resolve_conj(), grad_L, not ctx.backwards)
        if not ctx.needs_input_grad[0]:
            return None, adjoint_L, None
        if ctx.backwards:
            return adjoint_L[:-1] * state_L[1:].conj(), adjoint_L, None
        return adjoint_L[1:] * state_L[:-1].conj(), adjoint_L, None


def recur(decay_T: Tensor, input_L: Tensor, backwards: bool = False) -> Tensor:
    """`Recurrence`, with the type that checkers do not see through `apply`."""
    if not len(input_L):
        return input_L
    found: Any = Recurrence.apply(decay_T, input_L, backwards)
    return found


def _in_a_loop(decay_T: Tensor, input_L: Tensor, backwards: bool) -> Tensor:
    state_L = torch.empty(input_L.shape, dtype=input_L.dtype, device=input_L.device)
    steps = range(len(input_L))
    order = steps[::-1] if backwards else steps
    state_L[order[0]] = input_L[order[0]]
    for before, step in pairwise(order):
        decay = decay_T[min(before, step)]
        torch.addcmul(input_L[step], decay, state_L[before], out=state_L[step])
    return state_L


def _in_chunks(decay_T: Tensor, input_L: Tensor) -> Tensor:
    """About sqrt(L) steps of all chunks side by side, then the chunks' ends one after the other."""
    length = len(input_L)
    size = max(1, math.isqrt(length))
    chunks = -(-length // size)
    rows = (0, 0) * (input_L.dim() - 1)
    fill = chunks * size - length
    # A step that neither decays nor adds leaves the state alone; nothing lies before the first.
    decay_Cc = pad(decay_T, (*rows, 1, fill), value=1.0).unflatten(0, (chunks, size))
    input_Cc = pad(input_L, (*rows, 0, fill)).unflatten(0, (chunks, size))
    states, carries = [input_Cc[:, 0]], [decay_Cc[:, 0]]
    for step in range(1, size):
        states.append(decay_Cc[:, step] * states[-1] + input_Cc[:, step])
        carries.append(decay_Cc[:, step] * carries[-1])
    end, ends = torch.zeros_like(states[0][0]), []
    for chunk in range(chunks):
        ends.append(end)
        end = carries[-1][chunk] * end + states[-1][chunk]
    state_Cc = torch.stack(states, 1) + torch.stack(carries, 1) * torch.stack(ends)[:, None]
    return state_Cc.flatten(0, 1)[:length]


def scan_outputs(
    time_LBE: Tensor, input_LBE: Tensor, A_ES: Tensor, B_LBS: Tensor, C_LBS: Tensor
) -> Tensor:
    """`y_t = C_t h_t` for `h_t = exp(time_t A) h + B_t input_t`, [L, B, E].

    On a CPU step by step: states, decays and products of a step stay in its caches, and where no
    gradient is asked for only one state is held.
    """
    numbers = input_LBE[:1].numel() * A_ES.shape[1]
    if input_LBE.device.type != "cpu" or not numbers or numbers < _SCAN_FROM:
        return _outputs_at_once(time_LBE, input_LBE, A_ES, B_LBS, C_LBS)
    given = [x.contiguous() for x in (time_LBE, input_LBE, A_ES, B_LBS, C_LBS)]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    found: Any = _StepByStep.apply(*given, keep)
    return found


def _outputs_at_once(
    time_LBE: Tensor, input_LBE: Tensor, A_ES: Tensor, B_LBS: Tensor, C_LBS: Tensor
) -> Tensor:
    """As `scan_outputs`, over whole sequences: few operations, O(L B E S) memory."""
    decay_TBES = (time_LBE[1:, ..., None] * A_ES).exp()
    state_LBES = recur(decay_TBES, input_LBE[..., None] * B_LBS[:, :, None])
    return (state_LBES @ C_LBS[..., None])[..., 0]


class _StepByStep(Function):
    """`scan_outputs` as one operation; only the states are kept, decays are computed anew."""

    @staticmethod
    def forward(
        ctx: Any,
        time_LBE: Tensor,
        input_LBE: Tensor,
        A_ES: Tensor,
        B_LBS: Tensor,
        C_LBS: Tensor,
        keep: bool,
    ) -> Tensor:
        # Channels last: a state is [B, S, E], and what is one for all states a row of it.
        time_LB1E, input_LB1E = time_LBE[:, :, None], input_LBE[:, :, None]
        A_SE, B_LBS1, C_LB1S = A_ES.T.contiguous(), B_LBS[..., None], C_LBS[:, :, None]
        L, B, _, E = input_LB1E.shape
        y_LB1E = torch.empty_like(input_LB1E)
        state_LBSE = input_LBE.new_empty(L if keep else 1, B, len(A_SE), E)
        decay_BSE = torch.empty_like(state_LBSE[0])
        state_BSE = torch.mul(input_LB1E[0], B_LBS1[0], out=state_LBSE[0])
        torch.bmm(C_LB1S[0], state_BSE, out=y_LB1E[0])
        for step in range(1, L):
            torch.mul(time_LB1E[step], A_SE, out=decay_BSE).exp_()
            state_BSE = torch.mul(decay_BSE, state_BSE, out=state_LBSE[step if keep else 0])
            state_BSE.addcmul_(input_LB1E[step], B_LBS1[step])
            torch.bmm(C_LB1S[step], state_BSE, out=y_LB1E[step])
        ctx.save_for_backward(time_LBE, input_LBE, A_ES, B_LBS, C_LBS, state_LBSE)
        return y_LB1E[:, :, 0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_LBE,) = grad_outputs
        if torch.is_grad_enabled():
            # Somebody differentiates the gradient: it is written down operation by operation.
            given = ctx.saved_tensors[:-1]
            wanted = [x for x, need in zip(given, ctx.needs_input_grad, strict=False) if need]
            y_LBE = _outputs_at_once(*given)
            found = iter(torch.autograd.grad(y_LBE, wanted, grad_LBE, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:-1]), None
        return *_gradients(grad_LBE, *ctx.saved_tensors), None


def _gradients(
    grad_LBE: Tensor,
    time_LBE: Tensor,
    input_LBE: Tensor,
    A_ES: Tensor,
    B_LBS: Tensor,
    C_LBS: Tensor,
    state_LBSE: Tensor,
) -> tuple[Tensor, ...]:
    """Of times, inputs, A, B and C, from the last step to the first."""
    grad_LB1E, time_LB1E = grad_LBE.contiguous()[:, :, None], time_LBE[:, :, None]
    input_LBE1 = input_LBE[..., None]
    A_SE, B_LB1S, C_LBS1 = A_ES.T.contiguous(), B_LBS[:, :, None], C_LBS[..., None]
    of_time_LBE, of_input_LBE = torch.zeros_like(time_LBE), torch.empty_like(input_LBE)
    of_B_LBS, of_C_LBS = torch.empty_like(B_LBS), torch.empty_like(C_LBS)
    adjoint_BSE = torch.zeros_like(state_LBSE[0])
    of_A_BSE, decay_BSE, work_BSE = (torch.zeros_like(adjoint_BSE) for _ in range(3))
    for step in range(len(grad_LB1E) - 1, -1, -1):
        adjoint_BSE.addcmul_(grad_LB1E[step], C_LBS1[step])
        of_C_LBS[step] = (state_LBSE[step] @ grad_LB1E[step].mT)[..., 0]
        of_input_LBE[step] = (B_LB1S[step] @ adjoint_BSE)[:, 0]
        of_B_LBS[step] = (adjoint_BSE @ input_LBE1[step])[..., 0]
        if step:
            adjoint_BSE.mul_(torch.mul(time_LB1E[step], A_SE, out=decay_BSE).exp_())
            torch.mul(adjoint_BSE, state_LBSE[step - 1], out=work_BSE)
            of_A_BSE.addcmul_(work_BSE, time_LB1E[step])
            torch.sum(work_BSE.mul_(A_SE), 1, out=of_time_LBE[step])
    return of_time_LBE, of_input_LBE, of_A_BSE.sum(0).T, of_B_LBS, of_C_LBS
