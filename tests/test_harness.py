"""The ranks that the distributed tests stand on: fresh worlds of any size, DeepSpeed's engines, and honest failures."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.fp16 import fp16_on_cpu
from tests.harness.ranks import RankError, Ranks

WIDTH, BATCH, STEPS = 8, 8, 4
ADAMW = {"lr": 0.01, "weight_decay": 0.1}


def sum_of_ranks() -> tuple[int, int, int, int]:
    import torch.distributed as dist

    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    evens = list(range(0, dist.get_world_size(), 2))
    group = dist.new_group(evens)
    even_total = torch.tensor(dist.get_rank() + 1)
    if dist.get_rank() in evens:
        dist.all_reduce(even_total, group=group)
    return dist.get_rank(), dist.get_world_size(), int(total), int(even_total)


def test_worlds_of_any_size_in_any_order(ranks: Ranks) -> None:
    for size in (1, 8, 2, 5, 8, 3, 1):
        evens = sum(range(1, size + 1, 2))
        expected = [(r, size, size * (size + 1) // 2, r + 1 if r % 2 else evens) for r in range(size)]
        assert ranks.run(size, sum_of_ranks) == expected


# --- DeepSpeed's engines, all against one single-process loop ---


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)), nn.Linear(WIDTH, 1)]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def plain_losses() -> list[float]:
    model = nn.Sequential(*layers())
    adamw = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        loss = nn.functional.mse_loss(model(x), y)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    return losses


def deepspeed_config(stage: int, data_parallel: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // data_parallel // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **more,
    }


def zero_losses(stage: int) -> list[float]:
    import deepspeed
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    model = nn.Sequential(*layers())
    adamw = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=deepspeed_config(stage, world))
    losses = []
    for step in range(STEPS):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def pipeline_losses(stages: int) -> list[float]:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.pipe import PipelineModule

    data_parallel = dist.get_world_size() // stages
    model = PipelineModule(layers(), num_stages=stages, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    adamw = torch.optim.AdamW(model.parameters(), **ADAMW)
    config = deepspeed_config(1, data_parallel, accumulation=2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    shard = engine.grid.get_data_parallel_id()
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        pieces = [
            (px.chunk(2)[k], py.chunk(2)[k])
            for px, py in [(x.chunk(data_parallel)[shard], y.chunk(data_parallel)[shard])]
            for k in range(2)
        ]
        losses.append(engine.train_batch(iter(pieces)).item())
    return losses


def test_deepspeed_engines_of_differing_worlds_follow_the_plain_loop(ranks: Ranks) -> None:
    expected = pytest.approx(plain_losses(), rel=1e-5)
    jobs = [
        (2, zero_losses, 1),
        (4, pipeline_losses, 2),
        (4, zero_losses, 3),
        (1, zero_losses, 1),
        (4, pipeline_losses, 4),
        (8, zero_losses, 2),
        (2, pipeline_losses, 2),
        (8, zero_losses, 3),
        (2, zero_losses, 2),
        (8, pipeline_losses, 4),
    ]
    for world, function, option in jobs:
        for rank, losses in enumerate(ranks.run(world, function, option)):
            assert losses == expected, f"{function.__name__}({option}), rank {rank} of {world}"


def fp16_losses() -> tuple[str, list[float], list[float]]:
    import deepspeed

    config = deepspeed_config(1, 2, fp16={"enabled": True, "initial_scale_power": 32, "hysteresis": 1})
    model = nn.Sequential(*layers())
    adamw = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses, scales = [], []
    with fp16_on_cpu():
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
        for _ in range(40):
            x, y = (part[: BATCH // 2].half() for part in batch(0))
            loss = nn.functional.mse_loss(engine(x).float(), y.float())
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            scales.append(float(engine.optimizer.cur_scale))
    return str(next(model.parameters()).dtype), losses, scales


def test_fp16_trains_on_the_cpu_with_deepspeeds_own_loss_scaler(ranks: Ranks) -> None:
    for dtype, losses, scales in ranks.run(2, fp16_losses):
        assert dtype == "torch.float16"
        assert losses[-1] < 0.7 * losses[0]
        assert scales[0] < 2.0**32, "the first step did not overflow"
        assert scales == sorted(scales, reverse=True)
        assert scales[-1] >= 2.0


# --- What a rank is ---


def facts(*args: Any) -> dict[str, Any]:
    import deepspeed.accelerator

    first_time = not hasattr(torch, "_seen_by_the_harness_test")
    torch._seen_by_the_harness_test = True  # type: ignore[attr-defined]
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "omp": os.environ["OMP_NUM_THREADS"],
        "device": deepspeed.accelerator.get_accelerator().device_name(),
        "local_rank": os.environ["LOCAL_RANK"],
        "first_time": first_time,
        "preloaded": "tests.harness.preload" in sys.modules,
        "args": args,
    }


def test_each_job_has_its_own_processes_of_one_thread(ranks: Ranks) -> None:
    tensor = torch.arange(3.0)
    first, second = ranks.run(2, facts, 1, tensor, {"a": [2]}), ranks.run(2, facts)
    assert len({fact["pid"] for fact in first + second} | {os.getpid()}) == 5
    for rank, fact in enumerate(first):
        assert (fact["threads"], fact["omp"], fact["device"]) == (1, "1", "cpu")
        assert fact["local_rank"] == str(rank)
        assert fact["args"][0] == 1 and torch.equal(fact["args"][1], tensor) and fact["args"][2] == {"a": [2]}
    assert all(fact["first_time"] and fact["preloaded"] for fact in first + second)


def test_the_environment_of_the_tests_is_left_alone(ranks: Ranks) -> None:
    before = dict(os.environ)
    ranks.run(1, facts)
    before.pop("PYTEST_CURRENT_TEST"), (after := dict(os.environ)).pop("PYTEST_CURRENT_TEST")
    assert after == before


def print_and_return() -> None:
    print("a word from the rank")
    os.write(2, b"and one from below Python\n")


def test_what_ranks_print_is_the_tests_output(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.run(2, print_and_return)
    printed = capsys.readouterr().out
    for rank in range(2):
        assert f"[rank {rank}] a word from the rank\n" in printed
        assert f"[rank {rank}] and one from below Python\n" in printed


# --- Failures ---


def fail_on(bad: int, how: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == bad:
        print("last words")
        if how == "raise":
            raise ArithmeticError("the weights are lost")
        if how == "exit":
            sys.exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(1000)
    dist.all_reduce(torch.zeros(4))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_failing_ranks_own_traceback_is_raised(ranks: Ranks) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 2 of 4 .*in fail_on.*weights are lost.*last words") as e:
        ranks.run(4, fail_on, 2, "raise")
    assert (e.value.rank, e.value.exception) == (2, "ArithmeticError")
    assert time.monotonic() - started < 20
    assert ranks.run(4, sum_of_ranks)[3] == (3, 4, 10, 4), "the next job must not notice"


def test_a_rank_that_exits_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="SystemExit: 3") as e:
        ranks.run(2, fail_on, 1, "exit")
    assert e.value.rank == 1


def test_a_killed_rank_is_named_although_its_peers_complain(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 3 failed:\n.*killed by SIGKILL") as e:
        ranks.run(3, fail_on, 1, "kill")
    assert (e.value.rank, e.value.exception) == (1, "Died")


def test_a_hang_ends_with_every_stack(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"(?s)no result from rank\(s\) \[0, 1, 2\] of 3 after 3 s") as e:
        ranks.run(3, fail_on, 0, "hang", timeout=3)
    message = str(e.value)
    assert e.value.exception == "Timeout"
    assert message.count("in fail_on") == 3
    assert message.count("in all_reduce") == 2


def lose_a_peer_quietly() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(0.2)  # the others' complaint is reported first
        raise ValueError("the cause")
    raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


def test_a_lost_connection_is_not_taken_for_the_cause(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="ValueError: the cause"):
        ranks.run(3, lose_a_peer_quietly)


def return_what_cannot_be_sent() -> Any:
    return lambda: None


def test_a_result_that_cannot_be_sent_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"(?i)pickle"):
        ranks.run(1, return_what_cannot_be_sent)


def write_pid_and_hang(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(1000)


def test_no_rank_outlives_a_failed_job(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError):
        ranks.run(1, write_pid_and_hang, str(tmp_path / "pid"), timeout=2)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_jobs_that_no_rank_could_run_are_refused(ranks: Ranks) -> None:
    with pytest.raises(TypeError, match="top-level"):
        ranks.run(1, lambda: None)
    with pytest.raises(ValueError, match="world_size is 9"):
        ranks.run(9, facts)
