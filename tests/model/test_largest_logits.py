"""The largest attention logit of each head: in chunks, and by the Triton kernel, interpreted and compiled for a GPU.

What the interpreter does not see: products of bf16, which it gets wrong, speed, and a compiler's mistakes; tests/gpu
has the kernel on a device.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_stable.model import largest_logits
from megatron_stable.model.largest_logits import by_chunks, by_kernel, max_attention_logits, tile, usable
from tests.harness.triton import needs_triton


def draw(dtype: torch.dtype, kv_heads: int, length: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Queries of 4 heads and keys, [b, heads, s, d] as attention has them, so that heads of a position lie together.
    A key that only the future may not see would win wherever it is seen too early."""
    generator = torch.Generator().manual_seed(kv_heads)
    q, k = (torch.randn(2, length, n, width, dtype=torch.float64, generator=generator) for n in (4, kv_heads))
    q[..., 0], k[..., 0] = 1.0, 3.0 * torch.arange(length)[:, None].expand(-1, kv_heads) / length
    k[:, -1, :, 0] = 50.0
    q[:, -1, :, 0] = -1.0  # and the last query does not like it
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)


def spread(length: int) -> Tensor:
    """Starts of documents, [2, s], of which some begin with a block of queries, and some are longer than one."""
    places = torch.arange(length)
    begin = torch.zeros(2, length, dtype=torch.int64)
    for row, found in enumerate(((5, 6, 64, 100, 128), (3, 131))):
        for place in found:
            begin[row, place:] = place
    return begin.minimum(places)


def one_by_one(q: Tensor, k: Tensor) -> Tensor:
    """Each query with the keys that it may see, in float64."""
    share = q.shape[1] // k.shape[1]
    wide_q, wide_k = q.double(), k.double()
    return torch.stack(
        [
            torch.stack(
                [
                    torch.einsum("bd,bjd->bj", wide_q[:, head, i], wide_k[:, head // share, : i + 1]).max()
                    for i in range(q.shape[2])
                ]
            ).max()
            for head in range(q.shape[1])
        ]
    )


def within(q: Tensor, k: Tensor, starts: Tensor) -> Tensor:
    """The same of each document by itself."""
    found = []
    for row, begins in enumerate(starts):
        for begin in begins.unique().tolist():
            part = slice(begin, begin + int((begins == begin).sum()))
            found.append(one_by_one(q[row : row + 1, :, part], k[row : row + 1, :, part]))
    return torch.stack(found).amax(0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_chunks_stay_within_documents(kv_heads: int, chunk: int) -> None:
    q, k = draw(torch.float64, kv_heads, 150)
    wanted = within(q, k, spread(150))
    torch.testing.assert_close(by_chunks(q, k, chunk, spread(150)), wanted)
    assert (wanted < one_by_one(q, k)).any(), "the documents make no difference here"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 4, 9, 128])
def test_chunks_equal_one_query_at_a_time(kv_heads: int, chunk: int) -> None:
    q, k = draw(torch.float64, kv_heads, 9)
    torch.testing.assert_close(by_chunks(q, k, chunk), one_by_one(q, k))
    unmasked = (q @ k.repeat_interleave(4 // kv_heads, 1).transpose(-2, -1)).amax((0, 2, 3))
    assert (unmasked > by_chunks(q, k, chunk) + 10).all(), "the mask makes no difference here"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_scaled_products_in_fp32_or_better(dtype: torch.dtype) -> None:
    q, k = draw(dtype, 2, 40)
    found = max_attention_logits(q.requires_grad_(), k, 0.3)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not found.requires_grad
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-5  # products of bf16 are bf16 here
    torch.testing.assert_close(found.double(), 0.3 * one_by_one(q.detach(), k), rtol=bound, atol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if torch.is_tensor(x))])
        return out


def test_they_take_no_memory_of_s_by_s() -> None:
    q = torch.randn(1, 2, 512, 16)
    with Largest() as seen:
        by_chunks(q, q, chunk=32)
    assert 0 < seen.numel <= 2 * 32 * 512


def test_in_a_graph_they_are_one_operator() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k: max_attention_logits(q * 1.0, k, 0.3), backend=counter, fullgraph=True)
    q, k = draw(torch.float32, 2, 300)
    torch.testing.assert_close(compiled(q.requires_grad_(), k), max_attention_logits(q, k, 0.3))
    operators = [node for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert counter.frame_count == 1 and len(operators) < 8, operators
    torch.library.opcheck(torch.ops.megatron_stable.largest_products, (q.detach(), k))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets, which it decides when it is imported."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()
        yield pool


# lengths below, at, and beyond blocks of 128; widths that are no power of two, and one that is no multiple of 8; of
# fp32 of 128 columns blocks are of 64
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "length", "width"), [(4, 300, 16), (2, 128, 24), (1, 77, 12), (2, 257, 88), (4, 1, 64)]
)
def test_the_kernel_equals_one_query_at_a_time(
    interpreter: ProcessPoolExecutor, dtype: torch.dtype, kv_heads: int, length: int, width: int
) -> None:
    q, k = draw(dtype, kv_heads, length, width)
    found = interpreter.submit(by_kernel, q, k).result()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), one_by_one(q, k), rtol=1e-5, atol=0)


@needs_triton
@pytest.mark.parametrize(("kv_heads", "length", "width"), [(4, 300, 16), (2, 128, 24), (1, 77, 12), (2, 257, 88)])
def test_the_kernel_stays_within_documents(
    interpreter: ProcessPoolExecutor, kv_heads: int, length: int, width: int
) -> None:
    q, k = draw(torch.float32, kv_heads, length, width)
    wanted, starts = within(q, k, spread(length)), spread(length)
    found = interpreter.submit(by_kernel, q, k, starts).result()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    assert (found.double() < one_by_one(q, k)).any(), "the documents make no difference here"


@needs_triton
def test_the_kernel_takes_any_strides(interpreter: ProcessPoolExecutor) -> None:
    q, k = draw(torch.float32, 2, 150)
    wanted = one_by_one(q, k)
    for a, b in ((q.contiguous(), k.contiguous()), (q.mT.contiguous().mT, k), (q, k[:, :1].expand_as(k))):
        found = interpreter.submit(by_kernel, a, b).result()
        torch.testing.assert_close(found.double(), one_by_one(a, b) if b.stride(1) == 0 else wanted, rtol=1e-5, atol=0)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets")
@pytest.mark.parametrize(
    ("dtype", "width"), [("*bf16", 64), ("*bf16", 88), ("*bf16", 128), ("*bf16", 256), ("*fp16", 88)]
)
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_a_gpu_s_code_uses_tensor_cores_copies_16_bytes_and_spills_nothing(
    dtype: str, width: int, documents: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real compiler, for an H100, of heads whose strides are multiples of 8 elements."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    columns, block = tile(torch.bfloat16, width)
    kernel: Any = largest_logits._largest_of_a_block
    constants = {"unit": 8, "width": width, "columns": columns, "block": block, "documents": documents}
    types = {"q": dtype, "k": dtype, "starts": "*i64", "tops": "*fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(signature) if arg in ("q", "k")}
    options = {"num_warps": largest_logits.WARPS, "num_stages": largest_logits.STAGES}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    (tmp_path / "kernel.ptx").write_text(ptx)
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [assembler, "-v", "--gpu-name=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    assert "wgmma.mma_async" in ptx and "cp.async.cg.shared.global" in ptx
    assert "ld.global.b16" not in ptx and "ld.global.u16" not in ptx, "elements are loaded one by one"
    assert compiled.metadata.shared <= 99 * 1024, "more than a consumer's GPU has"


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets")
def test_where_triton_does_not_work_it_is_said_once() -> None:
    usable.cache_clear()
    with pytest.warns(UserWarning, match="computed by PyTorch, slowly, as Triton does not work here"):
        assert not usable(torch.device("cpu"), torch.bfloat16, 64)  # which it compiles nothing for
    assert not usable(torch.device("cpu"), torch.bfloat16, 64)
