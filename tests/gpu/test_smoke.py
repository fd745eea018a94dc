"""One GPU: it trains in bf16 and fp16, agrees with the CPU's fp32, with and without torch.compile; MFU is printed.

Run with ``pytest -o addopts= tests/gpu -s``: that needs no plugin of pytest, no launcher (the world is this process)
and no other part of the suite.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_stable.config.schema import Config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

VOCAB, SEQUENCE, GLOBAL = 1000, 256, 8


@pytest.fixture(scope="module")
def topology() -> Iterator[Any]:
    import torch.distributed as dist

    from megatron_stable.parallel.topology import Topology
    from megatron_stable.parallel.world import join_world

    if not dist.is_initialized():
        join_world()
    yield Topology()
    dist.destroy_process_group()


def make_config(dtype: str, size: str | None = None, batch: dict[str, int] | None = None, **model: Any) -> Config:
    shape = {"layers": 4, "hidden": 256, "heads": 4, "sequence_length": SEQUENCE}
    values = {
        "run": {"steps": 40, "seed": 5},
        "model": {"size": size, **({} if size else shape), "vocab_size": VOCAB, "recipe": "qk_norm_cap", **model},
        "precision": {"dtype": dtype, "initial_scale_power": 12},
        "batch": batch or {"global_size": GLOBAL, "micro_size": 4},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"kind": "constant", "warmup_steps": 5},
        "loss": {"z_loss": 1e-4},
    }
    return Config.model_validate(values)


def batch_of(config: Config, step: int) -> list[Tensor]:
    """Micro batches of noisy counting: something that a model learns within steps."""
    generator = torch.Generator().manual_seed(step)
    size, length, vocab = config.batch.global_size, config.model.sequence_length, config.model.vocab_size
    assert vocab is not None
    start = torch.randint(vocab, (size, 1), generator=generator)
    noise = torch.rand(size, length + 1, generator=generator) < 0.05
    tokens = (start + 7 * torch.arange(length + 1)) % vocab
    tokens = torch.where(noise, torch.randint(vocab, tokens.shape, generator=generator), tokens)
    return list(tokens.split(config.batch.micro_size))


def train(config: Config, topology: Any, steps: int) -> list[Any]:
    """The metrics of each step."""
    from megatron_stable.engine.engine import Engine
    from megatron_stable.optim.schedule import learning_rate

    engine = Engine(config, topology)
    return [
        engine.train_step(step, batch_of(config, step), learning_rate(config, step)).metrics
        for step in range(1, steps + 1)
    ]


def cpu_loss(config: Config) -> float:
    """Cross-entropy of the first global batch before any update, by the fp32 model on the CPU."""
    from megatron_stable.model.loss import language_model_loss
    from megatron_stable.model.transformer import Transformer, layer_list
    from megatron_stable.parallel.topology import TensorParallel

    alone = TensorParallel()
    model = Transformer(layer_list(config.model, alone, config.run.seed))
    tokens = torch.cat(batch_of(config, 1))
    with torch.no_grad():
        return float(language_model_loss(model(tokens[:, :-1]), tokens[:, 1:], alone, VOCAB, 0.0).cross_entropy)


# a loss near 7 whose logits come through a dozen roundings of 2^-9 (bf16) or 2^-12 (fp16), averaged over 2048 tokens
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-3), ("bf16", 1e-2), ("fp16", 3e-3)])
@pytest.mark.parametrize("recipe", ["baseline", "qk_norm", "qk_norm_cap"])
def test_trains_and_starts_at_the_loss_of_the_cpu(topology: Any, dtype: str, bound: float, recipe: str) -> None:
    config = make_config(dtype, recipe=recipe)
    metrics = train(config, topology, 30)
    assert metrics[0].loss == pytest.approx(cpu_loss(make_config("fp32", recipe=recipe)), rel=bound)
    assert metrics[-1].loss < metrics[0].loss - 1.0, [m.loss for m in metrics]
    assert not any(m.skipped for m in metrics)
    assert metrics[0].loss_scale == (2.0**12 if dtype == "fp16" else 1.0)


@pytest.mark.parametrize("fields", [{}, {"dropout": 0.1, "attention_dropout": 0.1, "activation_checkpointing": 2}])
def test_compiled_and_plain_agree(topology: Any, fields: dict[str, Any]) -> None:
    plain, compiled = (train(make_config("bf16", compile=on, **fields), topology, 20) for on in (False, True))
    # compiled dropout draws masks of its own: the loss is then another sample of the same
    bound = 0.05 if fields else 1e-2
    assert compiled[0].loss == pytest.approx(plain[0].loss, rel=bound)
    assert compiled[0].grad_norm == pytest.approx(plain[0].grad_norm, rel=10 * bound)
    assert compiled[-1].loss < compiled[0].loss - 1.0


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_flex_attention_equals_math(cap: float | None, kv_heads: int, dtype: torch.dtype, bound: float) -> None:
    from megatron_stable.model.backends import BACKENDS
    from megatron_stable.model.scores import Scores

    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 8, 384, 64), (2, kv_heads, 384, 64), (2, kv_heads, 384, 64), (2, 8, 384, 64))
    q, k, v, direction = (
        torch.randn(shape, device="cuda", generator=generator) * scale
        for shape, scale in zip(shapes, (3, 3, 1, 1), strict=True)  # logits of tens, which the cap bends
    )
    half = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in half]
    scores = Scores(64**-0.5, cap)
    found, wanted = BACKENDS["flex"](*half, scores, 0.0), BACKENDS["math"](*wide, scores, 0.0)
    assert (found.double() - wanted).norm() / wanted.norm() < bound
    gradients = torch.autograd.grad(found, half, direction.to(dtype))
    for gradient, reference in zip(gradients, torch.autograd.grad(wanted, wide, direction.double()), strict=True):
        assert (gradient.double() - reference).norm() / reference.norm() < bound


def test_loss_and_its_gradient_equal_torch_s() -> None:
    from megatron_stable.model.loss import vocab_parallel_cross_entropy

    logits = (3 * torch.randn(512, 1024, device="cuda")).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (512,), device="cuda")
    wide = logits.detach().double()[:, :VOCAB].requires_grad_()  # before backward, which writes over the logits
    nll, log_z = vocab_parallel_cross_entropy(logits, targets, None, VOCAB)
    (gradient,) = torch.autograd.grad((nll + 0.1 * log_z.square()).sum(), logits)
    reference = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    torch.testing.assert_close(nll.double(), reference, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad((reference + 0.1 * wide.logsumexp(-1).square()).sum(), wide)
    torch.testing.assert_close(gradient[:, :VOCAB].double(), wanted, rtol=2**-8, atol=1e-5)
    assert (gradient[:, VOCAB:] == 0).all()


def test_a_step_computes_its_loss_by_the_kernels(topology: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        train(make_config("bf16"), topology, 1)
    started = {event.key for event in seen.key_averages()}
    assert started, "the profiler saw nothing"
    assert {"_statistics_of_a_row", "_gradient_of_a_block"} <= started


@pytest.mark.parametrize("compiled", [False, True])
def test_prints_model_flops_utilisation(topology: Any, compiled: bool) -> None:
    """Tokens per second and MFU of the 302m size in bf16; a speed is printed, never asserted."""
    from megatron_stable.engine.engine import Engine
    from megatron_stable.training.flops import flops_per_token, peak_flops

    config = make_config("bf16", "302m", {"global_size": 8, "micro_size": 4}, recipe="qk_norm", compile=compiled)
    engine = Engine(config, topology)
    batch = batch_of(config, 1)
    losses = [engine.train_step(step, batch, 1e-4).metrics.loss for step in range(1, 4)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for step in range(4, 14):
        outcome = engine.train_step(step, batch, 1e-4)
    torch.cuda.synchronize()
    rate = 10 * 8 * config.model.sequence_length / (time.perf_counter() - start)
    flops = rate * flops_per_token(config.model)
    peak = peak_flops("bf16")
    share = f"{flops / peak:.1%} MFU" if peak else "MFU unknown: the device's peak is not listed"
    print(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, compile {compiled}: "
        f"{rate:,.0f} tokens/s, {flops / 1e12:.0f} TFLOP/s, {share}"
    )
    assert outcome.metrics.loss < losses[0]
