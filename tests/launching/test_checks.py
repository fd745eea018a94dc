"""What is made of the machines' answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_stable.launching.asking import Answer, _why
from megatron_stable.launching.checks import master_address, problems
from megatron_stable.launching.survey import Question, Survey, survey

GOOD = Survey(
    host="x", clock=0.0, python="3.11.2", versions={"torch": "2.13.0"}, source="s", config="c", sees=True, free=10**12,
    first="10.0.0.1", answer="refused", cores=64, gpus=8,
)  # fmt: skip


def machines(**different: Any) -> list[Answer]:
    """Four of them; ``node3=…`` differs in the fields that are given."""
    names = [f"node{number}" for number in range(1, 5)]
    return [Answer(name, replace(GOOD, host=name, **different.get(name, {}))) for name in names]


def told(answers: list[Answer], needed: float = 0.0) -> list[str]:
    slots = {answer.host: 8 for answer in answers}
    return [str(problem) for problem in problems(answers, slots, 29500, "/data/run", needed)]


def test_machines_that_are_alike_are_no_problem() -> None:
    assert told(machines()) == []


@pytest.mark.parametrize(
    ("different", "message"),
    [
        (
            {"versions": {"torch": "2.12.0"}},
            "error: node3: torch is 2.12.0 and not 2.13.0",
        ),
        ({"python": "3.12.1"}, "error: node3: python is 3.12.1 and not 3.11.2"),
        ({"source": "t"}, "error: node3: megatron_stable's source differs, or is not there"),
        ({"config": ""}, "error: node3: the configuration file differs, or is not there"),
        ({"sees": False}, "error: node3: run.directory /data/run is not on a file system that this machine shares"),
        ({"answer": "timed out"}, "error: node3: node1:29500 cannot be reached (timed out); does a firewall"),
        ({"gpus": 4}, "error: node3 has 4 GPUs and slots=8 in the hostfile"),
        (
            {"ranks": {"77": "megatron_stable.pretrain --config a.yaml"}},
            "warning: node3 trains already (megatron_stable",
        ),
    ],
)
def test_one_that_differs_is_named_with_what_differs(different: dict[str, Any], message: str) -> None:
    (found,) = told(machines(node3=different))
    assert found.startswith(message)


def test_a_port_that_is_taken_is_one_problem() -> None:
    taken = {"answer": "taken"}
    (found,) = told(machines(node1=taken, node2=taken, node3=taken, node4=taken))
    assert found.startswith("error: port 29500 of node1 is taken")


def test_a_machine_without_an_answer_comes_first() -> None:
    answers = machines(node2={"ranks": {"1": "megatron_stable.pretrain"}})
    answers[3] = Answer("node4", None, "Permission denied (publickey); …")
    first, second = told(answers)
    assert first == "error: node4: Permission denied (publickey); …" and second.startswith(
        "warning: node2 trains already"
    )


def test_clocks_are_compared_as_finely_as_they_were_read() -> None:
    answers = machines()
    answers[1] = replace(answers[1], offset=-3.0, uncertain=1.5)
    assert told(answers) == []
    answers[2] = replace(answers[2], offset=90.0, uncertain=1.5)
    assert told(answers) == ["warning: the clock of node3 differs by +90 s; set them by NTP"]


def test_space_is_that_of_the_fullest() -> None:
    (found,) = told(machines(node2={"free": 10**11}), needed=4e11)
    assert found == "warning: /data/run has 100.0 GB free; the checkpoints that are kept take 400.0 GB"


def test_the_master_is_where_the_others_find_it() -> None:
    surveys = [answer.survey for answer in machines(node1={"first": "127.0.0.1"}) if answer.survey]
    assert master_address(surveys) == "10.0.0.1"
    assert master_address(surveys[:1]) == "127.0.0.1"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "No ED25519 host key is known for n.\nHost key verification failed.",
            "ssh-keyscan node9 >> ~/.ssh/known_hosts",
        ),
        ("root@node9: Permission denied (publickey).", "ssh-copy-id node9"),
        ("ssh: connect to host node9 port 22: Connection timed out", "is it up"),
        ("/x/python: No module named megatron_stable", "install the package there"),
        ("something else", "something else"),
    ],
)
def test_what_ssh_says_is_told_with_the_remedy(said: str, remedy: str) -> None:
    told = _why("node9", said)
    assert told.startswith(said.splitlines()[-1]) and remedy in told


def test_this_machine_answers(tmp_path: Any) -> None:
    token, config = tmp_path / "token", tmp_path / "config.yaml"
    token.touch()
    config.touch()
    found = survey(Question(["nobody.invalid", "127.0.0.1"], 9, str(token), str(config)))
    assert found.sees and found.config and found.first == "127.0.0.1" and found.answer == "refused"
    assert found.free > 0 and found.cores > 0 and "127.0.0.1" not in found.addresses
    assert found.versions["torch"].startswith("2.")
