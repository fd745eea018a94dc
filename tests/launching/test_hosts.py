"""Hostfiles: read as DeepSpeed reads them, and refused with the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from megatron_stable.errors import ConfigError
from megatron_stable.launching.hosts import read_hostfile, span


def test_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# a comment\n\nnode2 slots=8\n  node1\tslots=4\nuser@10.0.0.7 slots=16\n")
    assert [*read_hostfile(path).items()] == [*fetch_hostfile(str(path)).items()]
    assert read_hostfile(path) == {"node2": 8, "node1": 4, "user@10.0.0.7": 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=8\nnode2\n", "line 2: 'node2' is not of the form 'HOST slots=RANKS'"),
        ("node1 slots=0\n", "line 1: 'node1 slots=0' is not of the form"),
        ("node1 slots=8 max=9\n", "line 1: 'node1 slots=8 max=9' is not of the form"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 is there twice"),
        ("# nobody\n", "names no host"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_hostfile(path)
    assert message in str(raised.value)


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


def test_many_hosts_in_few_words() -> None:
    assert span(["a", "b", "c", "d"]) == "a, b, c, d"
    assert span([f"n{i}" for i in range(1000)]) == "n0, n1, n2 and 997 more"
