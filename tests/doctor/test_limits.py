"""Limits of the operating system against what so many ranks need."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from megatron_stable.config.schema import Config
from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Verdict
from megatron_stable.doctor.limits import cgroup_limit, check_limits, open_files

CPU = torch.device("cpu")


def test_files_for_the_connections_of_all_ranks() -> None:
    assert open_files(8, limit=1024).verdict is Verdict.OK
    refused = open_files(1024, limit=1024)
    assert refused.verdict is Verdict.FAILURE
    assert refused.text == "at most 1,024 per process; 1024 ranks need up to 3,584"
    assert "nofile 4096" in refused.remedy
    assert open_files(1024, limit=4096).verdict is Verdict.OK
    assert open_files(10**6, limit=resource.RLIM_INFINITY).verdict is Verdict.OK


def test_a_run_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    """30B parameters on one rank: 18 bytes for each, and 4 for gradients that ZeRO-1 keeps."""
    large = Config.model_validate({"model": {"size": "30b", "vocab_size": 32000}, "precision": {"dtype": "bf16"}})
    small = Config.model_validate({"model": {"vocab_size": 1000}})
    found = {}
    for name, config in (("large", large), ("small", small)):
        rows = check_limits(Crew(0, ("a",), CPU, config, tmp_path))
        (found[name],) = [row for row in rows if row.check == "memory of the run"]
    assert found["large"].verdict is Verdict.FAILURE and "parallel.tensor" in found["large"].remedy
    assert found["small"].verdict is Verdict.OK


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    own, root = tmp_path / "self", tmp_path / "sys"
    (root / "pod/container").mkdir(parents=True)
    own.write_text("0::/pod/container\n")
    assert cgroup_limit(root, own) is None
    (root / "pod/container/memory.max").write_text("max\n")
    assert cgroup_limit(root, own) is None
    (root / "pod/memory.max").write_text("8000000000\n")
    assert cgroup_limit(root, own) == 8_000_000_000
    (root / "pod/container/memory.max").write_text("2000000000\n")
    assert cgroup_limit(root, own) == 2_000_000_000
    (root / "memory/job").mkdir(parents=True)
    own.write_text("5:cpu,memory:/job\n")
    (root / "memory/job/memory.limit_in_bytes").write_text("1000\n")
    assert cgroup_limit(root, own) == 1000
