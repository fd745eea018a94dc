"""The Triton kernels of the cross-entropy on a GPU, against float64 operators of torch, and what they allocate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_stable.model.cross_entropy import Columns
from megatron_stable.model.cross_entropy_kernels import TRITON, usable
from megatron_stable.model.loss import combined, vocab_parallel_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROWS, VOCAB, PADDED, Z = 193, 50_257, 50_304, 1e-2
# one rounding of the gradient to the dtype; fp32 has that of log Z, relative in exp(logit - log Z)
PRECISION = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def test_they_run_here() -> None:
    assert usable(torch.device("cuda")), "Triton does not work: the tests below would compare PyTorch with itself"


def draw(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, of which the padding is larger than all, and targets."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 5 * torch.randn(rows, columns, device="cuda", generator=generator)
    logits[:, VOCAB:] = 1000.0
    return logits.to(dtype), torch.randint(min(VOCAB, columns), (rows,), device="cuda", generator=generator)


def expected(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """nll, log Z and the gradient of sum(nll + Z log(Z)^2), in float64."""
    wide = logits[:, :VOCAB].double().requires_grad_()
    capped = wide if cap is None else cap * torch.tanh(wide / cap)
    nll, log_z = F.cross_entropy(capped, targets, reduction="none"), capped.logsumexp(1)
    (grad,) = torch.autograd.grad((nll + Z * log_z.square()).sum(), wide)
    return nll.detach(), log_z.detach(), F.pad(grad, (0, logits.shape[1] - wide.shape[1]))


def compare(found: tuple[Tensor, Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(found[2].double(), wanted[2], rtol=PRECISION[dtype], atol=5e-6)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_values_and_gradient_equal_float64(dtype: torch.dtype, cap: float | None) -> None:
    logits, targets = draw(ROWS, PADDED, dtype)
    wanted = expected(logits, targets, cap)
    logits.requires_grad_()
    nll, log_z = vocab_parallel_cross_entropy(logits, targets, None, VOCAB, cap, overwrite=True)
    (grad,) = torch.autograd.grad((nll + Z * log_z.square()).sum(), logits)
    assert grad.data_ptr() == logits.data_ptr(), "the kernels were not taken"
    compare((nll.detach(), log_z.detach(), grad), wanted, dtype)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("tensor", [2, 3])
def test_slices_of_the_vocabulary_are_as_one(tensor: int, cap: float | None) -> None:
    """By three ranks the last has nothing but padding."""
    width = PADDED // 2
    logits, targets = draw(ROWS, tensor * width, torch.bfloat16)
    wanted = expected(logits, targets, cap)
    slices = [part.contiguous() for part in logits.split(width, 1)]
    columns = [Columns(i * width, min(width, max(0, VOCAB - i * width)), cap) for i in range(tensor)]
    each = [TRITON.statistics(part, targets, own) for part, own in zip(slices, columns, strict=True)]
    top, total, target = combined(torch.stack(each))
    log_z = top + total.log()
    one = torch.ones_like(log_z)
    grads = [
        TRITON.gradient(part, targets, log_z, one, one + 2 * Z * log_z, own)
        for part, own in zip(slices, columns, strict=True)
    ]
    compare((log_z - target, log_z, torch.cat(grads, 1)), wanted, torch.bfloat16)


def test_rows_beyond_32_bits() -> None:
    """The last of 2^14 rows of 2^18 logits begins at 2^32 - 2^18."""
    rows, columns = 2**14, 2**18
    if torch.cuda.mem_get_info()[0] < 2.5 * rows * columns:
        pytest.skip("needs 11 GB of free memory")
    logits = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
    last, targets = draw(1, columns, torch.bfloat16)
    logits[-1:] = last
    wanted = expected(last, targets, None)
    logits.requires_grad_()
    nll, log_z = vocab_parallel_cross_entropy(logits, targets.expand(rows), None, VOCAB, overwrite=True)
    (grad,) = torch.autograd.grad((nll + Z * log_z.square()).sum(), logits)
    compare((nll[-1:].detach(), log_z[-1:].detach(), grad[-1:]), wanted, torch.bfloat16)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_nothing_as_large_as_the_logits_is_allocated(dtype: torch.dtype) -> None:
    logits, targets = draw(ROWS, PADDED, dtype)
    logits.requires_grad_()
    assert usable(logits.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nll, log_z = vocab_parallel_cross_entropy(logits, targets, None, VOCAB, overwrite=True)
    torch.autograd.grad((nll + Z * log_z.square()).sum(), logits)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.nbytes


def test_the_same_logits_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        logits, targets = draw(ROWS, PADDED, torch.bfloat16)
        nll, log_z = vocab_parallel_cross_entropy(logits.requires_grad_(), targets, None, VOCAB, 30.0)
        results.append((nll, log_z, *torch.autograd.grad((nll + Z * log_z.square()).sum(), logits)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
