"""The Triton kernels of the cross-entropy through Triton's compiler and NVIDIA's assembler; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_stable.model import cross_entropy_kernels as kernels
from tests.harness.triton import needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets"),
]


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", ["_statistics_of_a_row", "_gradient_of_a_block"])
def test_a_gpu_s_code_loads_16_bytes_at_a_time_and_spills_nothing(
    name: str, logits: str, cap: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real compiler, for an H100; rows begin at multiples of 16 bytes, as the padded vocabulary's do."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    types = {"logits": logits, "targets": "*i64", "cap": "constexpr", "block": "constexpr"}
    numbers = {"rows", "columns", "start", "valid"}
    signature = {arg: types.get(arg, "i32" if arg in numbers else "*fp32") for arg in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(signature) if arg in ("logits", "columns")}
    source = ASTSource(kernel, signature, constexprs={"cap": cap, "block": kernels.BLOCK}, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [assembler, "-v", "--gpu-name=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    assert compiled.asm["ptx"].count("ld.global.v4") == kernels.BLOCK // 256 * (2 if logits == "*bf16" else 4) // 16


def test_where_triton_does_not_work_it_is_said_once() -> None:
    kernels.usable.cache_clear()
    with pytest.warns(UserWarning, match="computed by PyTorch, slowly and with more memory, as Triton"):
        assert not kernels.usable(torch.device("cpu"))  # which it compiles nothing for
    assert not kernels.usable(torch.device("cpu"))
