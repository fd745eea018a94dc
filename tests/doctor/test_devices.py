"""What nvidia-smi says of GPUs, and what this machine's cores and names come to."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.devices import _troubles, check_cores, check_gpus, check_speed, rate
from megatron_stable.doctor.finding import Verdict
from megatron_stable.doctor.network import check_network

CPU = torch.device("cpu")


def crew(ranks: int = 1) -> Crew:
    return Crew(0, ("a",) * ranks, CPU, None, Path())


def test_troubles_of_gpus_are_named() -> None:
    """In the order of QUERY, as `nvidia-smi --format=csv,noheader,nounits` prints it."""
    good = ["NVIDIA H100 80GB HBM3", "570.86.15", "81559", "621", "0", "Not Active"]
    lines = [good, [*good[:4], "3", "Not Active"], [*good[:3], "40536", "0", "Active"], [*good[:4], "[N/A]", "[N/A]"]]
    found = [(each.check, each.verdict, each.text) for each in _troubles(lines)]
    assert found == [
        (
            "GPU memory errors",
            Verdict.FAILURE,
            "GPU 1 has had 3 ECC errors that were not corrected since it was started",
        ),
        ("GPU clocks", Verdict.WARNING, "GPU 2 is slowed down by its hardware (heat, or power)"),
        ("GPU memory", Verdict.WARNING, "GPU 2 has 40536 of 81559 MiB in use"),
    ]  # fmt: skip


def test_more_threads_than_cores_are_a_warning() -> None:
    cores = len(os.sched_getaffinity(0))
    assert check_cores(crew(1))[0].verdict is (Verdict.OK if torch.get_num_threads() <= cores else Verdict.WARNING)
    (many,) = check_cores(crew(cores + 1))
    assert many.verdict is Verdict.WARNING
    assert many.text.startswith(f"{cores} cores, {cores + 1} ranks with ")


def test_a_machine_without_gpus() -> None:
    (finding,) = check_gpus(crew())
    assert finding.verdict is Verdict.OK and finding.text.startswith("none")
    (speed,) = check_speed(crew())
    assert set(speed.numbers) == {"fp32", "bf16", "fp16"}
    assert rate(torch.float32, CPU, seconds=0.05) > 0.05


def test_the_interface_is_the_one_gloo_is_told(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert check_network(crew())[0].text.startswith("lo leads to rank 0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-card")
    wrong = check_network(crew())[0]
    assert wrong.verdict is Verdict.WARNING and "no such interface" in wrong.text
