"""Vocab-parallel cross-entropy and z-loss against float64 operators of torch; what it allocates and what it sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_stable.model import cross_entropy
from megatron_stable.model.cross_entropy import PYTORCH, Columns
from megatron_stable.model.loss import combined, language_model_loss, vocab_parallel_cross_entropy
from megatron_stable.parallel.topology import TensorParallel, Topology
from tests.harness.ranks import Ranks

PADDED, VOCAB, SHAPE = 128, 77, (3, 5)  # on 4 ranks: 32, 32, 13 and 0 columns of the vocabulary


@dataclass(frozen=True)
class Inputs:
    """Padded logits and targets, and the weight of each output in the scalar that is differentiated."""

    logits: Tensor
    targets: Tensor
    of_nll: Tensor
    of_log_z: Tensor


def inputs(dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*SHAPE, PADDED, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, SHAPE, generator=generator)
    targets[0, :4] = torch.tensor([0, 31, 32, VOCAB - 1])  # edges of shards
    logits[0, 1, 31] += 14.0  # a token that the model is sure of: the gradient's two terms nearly cancel
    logits[1, 2] += 300.0  # exp would overflow
    logits[..., VOCAB:] = 500.0  # padding that would dominate if it took part
    weights = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    return Inputs(logits.to(dtype), targets, *weights)


def expected(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """nll, log Z and the gradient of sum(w1 nll + w2 log(Z)^2), in float64 by torch's operators."""
    logits = given.logits.double()[..., :VOCAB].clone().requires_grad_()
    nll = F.cross_entropy(logits.flatten(0, 1), given.targets.flatten(), reduction="none").view(SHAPE)
    log_z = logits.logsumexp(-1)
    (given.of_nll * nll + given.of_log_z * log_z.square()).sum().backward()
    assert logits.grad is not None
    return nll.detach(), log_z.detach(), logits.grad


def on_rank(dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    tp = Topology(torch.distributed.get_world_size()).tp
    return compute(tp, dtype, chunk)


def compute(tp: TensorParallel, dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    given = inputs(dtype)
    columns = PADDED // tp.size
    logits = given.logits[..., tp.rank * columns : (tp.rank + 1) * columns].clone().requires_grad_()
    with mock.patch.object(cross_entropy, "IN_CACHE", chunk):
        nll, log_z = vocab_parallel_cross_entropy(logits, given.targets, tp, VOCAB)
        (given.of_nll * nll + given.of_log_z * log_z.square()).sum().backward()
    assert logits.grad is not None
    return nll.detach(), log_z.detach(), logits.grad


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_equal_float64(ranks: Ranks, tensor: int, dtype: torch.dtype) -> None:
    nll, log_z, grad = expected(inputs(dtype))
    results = ranks.run(tensor, on_rank, dtype, 2**24)
    for found_nll, found_log_z, _ in results:
        # logits are taken as given, so also for bf16 the result is good to fp32
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        precision = 1e-12 if dtype == torch.float64 else 1e-6
        assert found_nll.dtype == found_log_z.dtype == wide
        # nll is a difference of numbers up to 300
        torch.testing.assert_close(found_nll.double(), nll, rtol=precision, atol=300 * precision)
        torch.testing.assert_close(found_log_z.double(), log_z, rtol=precision, atol=precision)
        assert torch.equal(found_nll, results[0][0]) and torch.equal(found_log_z, results[0][1]), "ranks differ"
    found = torch.cat([gradient for _, _, gradient in results], -1)
    assert found.dtype == dtype
    assert (found[..., VOCAB:] == 0).all(), "padding has a gradient"
    # relative: each element is rounded once, after the two terms of the target's column have cancelled
    relative = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2**-8}[dtype]
    absolute = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-5}[dtype]
    torch.testing.assert_close(found[..., :VOCAB].double(), grad, rtol=relative, atol=absolute)


def test_a_rank_whose_logits_are_minus_infinity_counts_for_nothing() -> None:
    """As those of fp16 are that fell below -65504; of the last of the ranks all columns are padding."""
    logits, targets = inputs(torch.float16).logits.flatten(0, 1), torch.full((15,), VOCAB - 1)
    logits[:, :32] = -torch.inf
    each = [
        PYTORCH.statistics(part, targets, Columns(32 * rank, max(0, min(32, VOCAB - 32 * rank)), None))
        for rank, part in enumerate(logits.split(32, 1))
    ]
    top, total, target = combined(torch.stack(each))
    wide = logits[:, :VOCAB].double()
    torch.testing.assert_close((top + total.log()).double(), wide.logsumexp(1), rtol=1e-6, atol=0)
    assert torch.equal(target.double(), wide[:, -1])


@pytest.mark.parametrize("rows", [1, 2, 4, 14, 15, 16])
def test_chunks_change_nothing(rows: int) -> None:
    whole = compute(TensorParallel(), torch.float32, 2**24)
    for one, other in zip(whole, compute(TensorParallel(), torch.float32, rows * PADDED), strict=True):
        assert torch.equal(one, other)


def test_a_chunk_smaller_than_a_row_still_holds_one() -> None:
    for one, other in zip(
        compute(TensorParallel(), torch.float32, 2**24), compute(TensorParallel(), torch.float32, 1), strict=True
    ):
        assert torch.equal(one, other)


def test_gradcheck() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.tensor([0, 3, 6, 2])
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_cross_entropy(x, targets, vocab_size=7), (logits,), atol=1e-8
    )


def test_loss_is_the_mean_and_the_z_loss_has_its_coefficient() -> None:
    given = inputs(torch.float64)
    logits = given.logits.clone().requires_grad_()
    losses = language_model_loss(logits, given.targets, TensorParallel(), VOCAB, 1e-3)
    nll, log_z, _ = expected(given)
    assert losses.cross_entropy.item() == pytest.approx(nll.mean().item(), rel=1e-12)
    assert losses.z_loss.item() == pytest.approx(1e-3 * log_z.square().mean().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(losses.z_loss, logits)
    reference = given.logits[..., :VOCAB].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(1e-3 * reference.logsumexp(-1).square().mean(), reference)
    torch.testing.assert_close(gradient[..., :VOCAB], wanted)


class Recorder(TorchDispatchMode):
    """Elements of every fp32 tensor made, storages as large as the logits, and elements sent by collectives."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.fp32 = 0
        self.sent: list[int] = []
        self.size = logits.numel() * logits.element_size()
        self.known = {logits.untyped_storage().data_ptr()}
        self.kept: list[Tensor] = []  # storages stay alive, so that an address is not used twice
        self.large = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            tensors = [tensor for tensor in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(tensor)]
            self.sent.append(min(tensor.numel() for tensor in tensors))  # what is gathered into is larger
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not torch.is_tensor(tensor):
                continue
            if tensor.dtype == torch.float32:
                self.fp32 = max(self.fp32, tensor.numel())
            address = tensor.untyped_storage().data_ptr()
            if address not in self.known and tensor.untyped_storage().nbytes() >= self.size:
                self.large += 1
            self.known.add(address)
            self.kept.append(tensor)
        return out


def recorded() -> tuple[int, int, list[int], int]:
    """(largest fp32 tensor, new storages as large as the logits, sizes sent, size of the logits)."""
    tp = Topology(torch.distributed.get_world_size()).tp
    n, columns = 64, 512 // tp.size
    logits = torch.randn(4, n // 4, columns, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(500, (4, n // 4), generator=torch.Generator().manual_seed(0))
    with mock.patch.object(cross_entropy, "IN_CACHE", 8 * columns), Recorder(logits) as recorder:
        torch.autograd.grad(sum(language_model_loss(logits, targets, tp, 500, 1e-3)), logits)
    return recorder.fp32, recorder.large, recorder.sent, logits.numel()


def test_no_second_copy_of_the_logits_and_no_logits_between_ranks(ranks: Ranks) -> None:
    for largest, large, sent, size in ranks.run(2, recorded):
        assert largest == size // 8, "an fp32 tensor is larger than a chunk"
        assert large == 1, "beside the gradient, something as large as the logits was made"
        assert sent == [3 * 64], "not one collective, of three numbers per token"
