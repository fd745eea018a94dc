"""The benchmark of a GPU runs to its end on any machine, a case that fails is a row, and kernels have their kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from gpu_steps import Case, make_config, masked_flops, smaller, told  # noqa: E402
from kernel_kinds import Span, busy, classify, own_times, report, spans, summary  # noqa: E402

sys.path.remove(str(BENCHMARKS))  # other tests are to find no more modules than there are
# as torch.profiler prints them on H100, A100 and a CPU, without their last arguments
NAMES = {
    "matrix products": [
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN",
        "nvjet_sm100_tst_64x16_64x16_2x4_2cta_h_bz_splitK_TNT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
        "ampere_sgemm_128x64_nn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>",
        "triton_tem_fused__to_copy_addmm_gelu_t_view_9",
        "triton_tem_fused_bmm_7",
        "aten::addmm",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, cutlass::bfloat16_t>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<128>>",
        "fmha_cutlassB_bf16_aligned_128x128_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x",
        "triton_tem_fused_flex_attention_backward_split_transpose",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>>",
        "_largest_of_a_block",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "element-wise": [
        "triton_poi_fused_add_addmm_gelu_mul_0",
        "triton_poi_fused__scaled_dot_product_flash_attention_clone_transpose_view_3",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, MulFunctor<float> >>",
        "aten::mul",
    ],
    "norms": [
        "triton_per_fused_native_layer_norm_0",
        "triton_red_fused_add_native_layer_norm_native_layer_norm_backward_sum_7",
        "triton_per_fused_add_native_layer_norm_transpose_view_2",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 32u, 8u, 64u>",
    ],
    "loss": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::exp_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::_scatter_gather_elementwise_kernel<128, 8, _cuda_scatter_gather_internal_kernel>",
        "void at::native::reduce_kernel<512, 1, ReduceOp<c10::BFloat16, at::native::MaxOps<c10::BFloat16>>>",
        "void (anonymous namespace)::softmax_warp_backward<c10::BFloat16, c10::BFloat16, float, 9, true, false>",
        "triton_red_fused__log_softmax_nll_loss_forward_1",
        "_CrossEntropyBackward",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>",
        "void at::native::<unnamed>::multi_tensor_apply_kernel<TensorListMetadata<2>, Copy<c10::BFloat16>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor>",
        "aten::_fused_adamw_",
    ],
    "embedding": ["void at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16, long>(long const*)"],
    "copies": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16tofloat32_copy_kernel_cuda>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2>, unsigned int, 3>",
    ],
    "collectives": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_Generic_1(ncclDevKernelArgsStorage<4096ul>)",
    ],
    "reductions": [
        "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float, func_wrapper_t<float, sum_functor>>>"
    ],
    "other": ["my_own_kernel"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_a_kernel_is_of_its_kind(kind: str, name: str) -> None:
    assert classify(name) == kind


def event(name: str, category: str, start: float, duration: float, thread: int = 7) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration, "pid": 0, "tid": thread}


def test_a_device_s_trace_gives_time_by_kind_and_idle() -> None:
    trace = {
        "traceEvents": [
            event("aten::mm", "cpu_op", 0, 500, 1),  # the host's, which do not count beside kernels
            event("ProfilerStep#0", "gpu_user_annotation", 0, 900),
            event("nvjet_tst_128x128", "kernel", 100, 300),
            event("nvjet_tst_128x128", "kernel", 400, 100),
            event("flash_fwd_kernel", "kernel", 600, 200),
            event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 700, 200, 8),  # beside it, in another stream
            {"ph": "i", "name": "a mark", "ts": 1},
        ]
    }
    found = summary(spans(trace))
    assert found.seconds == pytest.approx(800e-6)
    assert found.kinds == pytest.approx(
        {"matrix products": 400e-6, "attention": 200e-6, "copies": 200e-6, "idle": 100e-6}
    )
    assert found.names["matrix products"] == [("nvjet_tst_128x128", pytest.approx(400e-6), 2)]
    assert found.launched == 3
    lines = report(found).splitlines()
    assert lines[2].startswith("| matrix products | 0.40 | 50.0% | 2 |")
    assert lines[-1] == "Largest beside matrix products: attention (25.0%), copies (25.0%), idle (12.5%)."


def test_operators_count_without_those_that_they_call() -> None:
    trace = {
        "traceEvents": [
            event("aten::linear", "cpu_op", 0, 100),
            event("aten::t", "cpu_op", 10, 5),
            event("aten::addmm", "cpu_op", 20, 70),
            event("aten::copy_", "cpu_op", 30, 10),
            event("aten::add", "cpu_op", 50, 30, 8),  # another thread's
        ]
    }
    found = spans(trace)
    assert [1e6 * own for own in own_times(found)] == pytest.approx([25, 5, 60, 10, 30])
    assert busy(found) == pytest.approx(100e-6)
    assert summary(found).launched == 5


def test_kernels_of_a_stream_that_overlap_share_the_time() -> None:
    found = [Span("a", "kernel", 0.0, 10.0, (0, 7)), Span("b", "kernel", 8.0, 12.0, (0, 7))]
    assert sum(own_times(found)) == busy(found) == 12.0


def test_causal_attention_counts_the_keys_that_a_query_sees() -> None:
    model = make_config(Case("tiny"), "fp32").model
    s, width = model.sequence_length, model.heads * model.head_dim
    seen = sum(4 * width * (query + 1) for query in range(s)) / s  # forward: q k and p v, a multiplication and a sum
    whole = 4 * width * s
    # the diagonal, which half of the square halves, is all that is between them
    assert masked_flops(model) == pytest.approx(3 * model.layers * (whole - seen), rel=1.1 / s)


def test_what_does_not_fit_is_tried_with_half_the_micro_batch() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
    (half,) = smaller(Case("830m", accumulation=8), full)
    assert (half.sequences, half.accumulation) == (2, 8)
    assert smaller(Case("830m", micro=1), full) == smaller(Case("830m"), RuntimeError()) == []
    assert told(full) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def smoke(tmp_path: Path, *options: str) -> tuple[str, list[dict[str, Any]]]:
    """What the command prints, and the lines of its JSON."""
    file = tmp_path / "gpu.jsonl"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--json", str(file), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, [json.loads(line) for line in file.read_text().splitlines()]


def test_it_measures_case_by_case_and_a_case_that_fails_is_a_row(tmp_path: Path) -> None:
    chart = tmp_path / "deep" / "gpu.png"
    printed, lines = smoke(tmp_path, "--cases", "plain", "--profile", "--chart", str(chart))
    assert chart.read_bytes().startswith(b"\x89PNG")
    checks, rows = ([line for line in lines if key in line] for key in ("check", "case"))
    assert [check["check"] for check in checks] == ["fp32 qk_norm plain", "bf16 qk_norm plain"]
    assert all(0 <= check["off"] <= check["bound"] for check in checks)
    assert checks[1]["off"] > 0, "bf16 has been compared with itself"
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "flex needs a CUDA GPU" in rows[1]["error"]
    for row in (rows[0], rows[2]):
        assert row["pairs"] >= 2 and row["kernels"] > 100 and row["gigabytes"] > 0.01
        for low, middle, high in (row["seconds"], row["ratio"]):
            assert 0 < low <= middle <= high and isfinite(high)
        tokens = 64 * 2 * row["accumulation"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"][1])
    table = [line for line in printed.splitlines() if line.startswith("| tiny")]
    assert [line.split("|")[1].strip() for line in table] == [row["case"] for row in rows]
    assert {line.count("|") for line in table} == {10}
    assert "| matrix products |" in printed and "Largest beside matrix products: " in printed
    (profile,) = (line for line in lines if "profile" in line)
    assert sum(profile["kinds"].values()) == pytest.approx(profile["seconds"], rel=1e-6)


@pytest.mark.full
def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--no-checks", "--minutes", "0.01"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, "nothing was measured"
    assert "Not measured, as the time was up: tiny qk_norm plain 1x2; " in done.stdout


@pytest.mark.full
def test_compiled_cases_are_measured(tmp_path: Path) -> None:
    _, lines = smoke(tmp_path, "--cases", "compiled", "--no-checks")
    (row,) = lines
    assert not row["error"] and row["compile_seconds"] > 0.1 and isfinite(row["ratio"][1])


@pytest.mark.full
def test_a_compilation_that_takes_too_long_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    _, (compiled, plain) = smoke(tmp_path, "--cases", "compiled|recomputed", "--no-checks", "--limit", "4")
    assert compiled["error"] == "TooLong: broken off after 4 s"
    assert not plain["error"] and plain["pairs"] >= 2
