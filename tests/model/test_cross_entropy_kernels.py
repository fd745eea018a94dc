"""The Triton kernels of the cross-entropy against float64, under Triton's interpreter: no GPU is needed.

What this does not see: speed, and a compiler's mistakes; tests/gpu has these kernels on a device.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_stable.model import cross_entropy_kernels as kernels
from megatron_stable.model.cross_entropy import Columns
from megatron_stable.model.loss import combined, vocab_parallel_cross_entropy
from tests.harness.triton import needs_triton

pytestmark = needs_triton


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets, which it decides when it is imported."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()
        yield pool


class Case(NamedTuple):
    """Rows of logits, of which those from ``valid`` on are padding, and the weights of nll and of log(Z)^2."""

    dtype: torch.dtype
    columns: int
    valid: int
    cap: float | None = None
    rows: int = 7

    @property
    def logits(self) -> Tensor:
        """Of the first rows one is sure of its target, one's exp would overflow, one's maximum comes last; the padding
        is larger than all."""
        generator = torch.Generator().manual_seed(0)
        logits = 5 * torch.randn(self.rows, self.columns, dtype=torch.float64, generator=generator)
        logits[0, self.targets[0]] += 25.0
        logits[1] += 300.0
        logits[2, self.valid - 1] += 25.0
        logits[:, self.valid :] = 1000.0
        return logits.to(self.dtype)

    @property
    def targets(self) -> Tensor:
        """With both ends of the vocabulary, and both sides of its middle, where a second rank begins."""
        targets = torch.randint(self.valid, (self.rows,), generator=torch.Generator().manual_seed(1))
        half = self.columns // 2
        targets[:4] = torch.tensor([half - 1, half, 0, self.valid - 1]).clamp(0, self.valid - 1)
        return targets.repeat_interleave(2)[::2]  # not contiguous, as targets may be

    @property
    def weights(self) -> Tensor:
        return torch.randn(2, self.rows, generator=torch.Generator().manual_seed(2))


CASES = {
    f"{str(dtype).removeprefix('torch.')}, {columns} columns, {valid} valid, cap {cap}": Case(
        dtype, columns, valid, cap
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for columns, valid in ((128, 77), (3 * kernels.BLOCK // 2, 5003), (2 * kernels.BLOCK, kernels.BLOCK))
    for cap in (None, 30.0)
}
CASES["one row, one column"] = Case(torch.float32, 1, 1, rows=4)


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """nll, log Z, and the gradient of sum(w1 nll + w2 log(Z)^2), by torch's operators in float64."""
    logits = case.logits.double()[:, : case.valid].requires_grad_()
    capped = logits if case.cap is None else case.cap * torch.tanh(logits / case.cap)
    nll, log_z = F.cross_entropy(capped, case.targets, reduction="none"), capped.logsumexp(1)
    (case.weights[0] * nll + case.weights[1] * log_z.square()).sum().backward()
    assert logits.grad is not None
    return nll.detach(), log_z.detach(), F.pad(logits.grad, (0, case.columns - case.valid))


def through_autograd(case: Case) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Whether the gradient lies where the logits were is the last."""
    logits = case.logits.requires_grad_()
    nll, log_z = vocab_parallel_cross_entropy(logits, case.targets, None, case.valid, case.cap, overwrite=True)
    (grad,) = torch.autograd.grad((case.weights[0] * nll + case.weights[1] * log_z.square()).sum(), logits)
    return nll.detach(), log_z.detach(), grad, grad.data_ptr() == logits.data_ptr()


def on_two_ranks(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each half of the columns as a rank has it; the last are the statistics of each."""
    width = case.columns // 2
    halves = [half.contiguous() for half in case.logits.split(width, 1)]
    columns = [Columns(rank * width, min(width, max(0, case.valid - rank * width)), case.cap) for rank in (0, 1)]
    each = [kernels.TRITON.statistics(half, case.targets, own) for half, own in zip(halves, columns, strict=True)]
    top, total, target = combined(torch.stack(each))
    log_z = top + total.log()
    of_target, of_log_z = case.weights[0], 2 * case.weights[1] * log_z
    grads = [
        kernels.TRITON.gradient(half, case.targets, log_z, of_target, of_target + of_log_z, own)
        for half, own in zip(halves, columns, strict=True)
    ]
    return log_z - target, log_z, torch.cat(grads, 1), torch.stack(each)


def check(case: Case, nll: Tensor, log_z: Tensor, grad: Tensor) -> None:
    wanted_nll, wanted_log_z, wanted = expected(case)
    assert nll.dtype == log_z.dtype == torch.float32 and grad.dtype == case.dtype
    # logits are taken as given, so that of bf16 too nll and log Z are good to fp32: 2^-24 of 300, some times over
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=2e-6, atol=1e-4 if case.cap is None else 1e-5)
    torch.testing.assert_close(log_z.double(), wanted_log_z, rtol=2e-6, atol=1e-5)
    assert (grad[:, case.valid :] == 0).all(), "padding has a gradient"
    # log Z of 300 has an error of 2e-5, which is relative in exp(logit - log Z); then comes one rounding to the dtype,
    # to bf16 towards zero: so does the interpreter, a GPU to the nearest
    relative = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}[case.dtype]
    size = max(1.0, float(wanted.abs().max()))  # of the z-loss's gradient where log Z is 300
    torch.testing.assert_close(grad.double(), wanted, rtol=relative, atol=2e-5 * size)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradient_equal_float64(interpreter: ProcessPoolExecutor, name: str) -> None:
    case = CASES[name]
    nll, log_z, grad, in_place = interpreter.submit(through_autograd, case).result()
    check(case, nll, log_z, grad)
    assert in_place, "the kernels were not taken"


@pytest.mark.parametrize("name", [name for name in CASES if name != "one row, one column"])
def test_two_ranks_are_as_one(interpreter: ProcessPoolExecutor, name: str) -> None:
    case = CASES[name]
    nll, log_z, grad, each = interpreter.submit(on_two_ranks, case).result()
    check(case, nll, log_z, grad)
    assert each.isfinite().all()
    if case.valid <= case.columns // 2:  # the second rank has padding only
        assert (each[1, 1:] == 0).all()


def test_float64_stays_float64(interpreter: ProcessPoolExecutor) -> None:
    case = Case(torch.float64, 128, 77, 30.0)
    nll, log_z, grad, in_place = interpreter.submit(through_autograd, case).result()
    for found, wanted in zip((nll, log_z, grad), expected(case._replace(cap=30.0)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the weights are fp32
    assert nll.dtype == torch.float64 and not in_place


def errors(again: str) -> str:
    """What is said when somebody wants the logits after a backward pass; nothing, if they can be had."""
    case = Case(torch.float32, 128, 77)
    logits = case.logits.requires_grad_()
    other = logits.square().sum()  # keeps the logits for its backward
    nll, _ = vocab_parallel_cross_entropy(logits, case.targets, None, case.valid, overwrite=True)
    loss = nll.sum()
    torch.autograd.grad(loss, logits, retain_graph=True)
    try:
        torch.autograd.grad(loss if again == "loss" else other, logits)
    except RuntimeError as error:
        return str(error)
    return ""


def kept(case: Case) -> list[bool]:
    """Without leave to overwrite: whether the logits are as before, and a second backward as the first."""
    logits = case.logits.requires_grad_()
    before = logits.detach().clone()
    nll, log_z = vocab_parallel_cross_entropy(logits, case.targets, None, case.valid, case.cap)
    loss = (nll + log_z.square()).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    return [torch.equal(logits, before), torch.equal(first, second), first.data_ptr() != logits.data_ptr()]


def test_logits_stay_unless_they_may_be_overwritten(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(kept, Case(torch.float32, 128, 77, 30.0)).result() == [True, True, True]


def test_there_is_no_second_backward(interpreter: ProcessPoolExecutor) -> None:
    assert "no second backward" in interpreter.submit(errors, "loss").result()


def test_another_reader_of_the_logits_is_told(interpreter: ProcessPoolExecutor) -> None:
    assert "modified by an inplace operation" in interpreter.submit(errors, "other").result()


def of_broken(value: float) -> list[Any]:
    case = Case(torch.bfloat16, 128, 77)
    logits = case.logits
    logits[2, 5] = value
    nll, log_z = vocab_parallel_cross_entropy(logits, case.targets, None, case.valid)
    return [nll.isfinite().tolist(), log_z.isfinite().tolist()]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(interpreter: ProcessPoolExecutor, value: float) -> None:
    """A step is dropped because its loss is not finite: a maximum that overlooks NaN must not hide it."""
    wanted = [row != 2 for row in range(7)]
    assert interpreter.submit(of_broken, value).result() == [wanted, wanted]


def of_minus_infinity() -> Tensor:
    return kernels.TRITON.statistics(torch.full((3, 64), -torch.inf), torch.arange(3), Columns(64, 64, None))


def test_where_all_logits_are_minus_infinity_their_sum_is_0(interpreter: ProcessPoolExecutor) -> None:
    top, total, target = interpreter.submit(of_minus_infinity).result()
    assert top.isfinite().all() and (total == 0).all() and (target == 0).all()  # targets are below the first column
