"""Ask all machines for their survey, over ssh, side by side."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

from megatron_stable.launching.survey import MARK, Question, Survey

CONNECT, ANSWER = 10, 60  # seconds
AT_ONCE = 64
# what ssh or the shell says, and what to do about it
REMEDIES = {
    "Host key verification failed": "its key is unknown or has changed: ssh-keygen -R {host}; ssh-keyscan {host} >> "
    "~/.ssh/known_hosts",
    "Permission denied (": "it does not take this user's key: ssh-copy-id {host} (also for this machine itself)",
    "Could not resolve hostname": "no such name here: correct the hostfile, or add it to /etc/hosts",
    "Connection refused": "no sshd listens there: start it, or give its port in ~/.ssh/config",
    "No route to host": "is it up, and in this network?",
    "timed out": "is it up, and does a firewall let ssh through?",
    "No such file or directory": "it needs the same environment at the same path, {python}",
    "not found": "it needs the same environment at the same path, {python}",
    "No module named": "install the package there, into the environment of {python}",
}


@dataclass
class Answer:
    """Of one machine.

    Attributes:
        survey: ``None``: there is none; ``error`` says why.
        offset: Seconds that its clock is ahead of this machine's, uncertain by ``uncertain``.
    """

    host: str
    survey: Survey | None
    error: str = ""
    offset: float = 0.0
    uncertain: float = 0.0


def ask(hosts: Iterable[str], question: Question, told: Callable[[Answer], None] = lambda answer: None) -> list[Answer]:
    """All answers, in the order of ``hosts``; ``told`` is called with each as it comes."""
    hosts = list(hosts)
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        asked = {pool.submit(_ask, host, question): host for host in hosts}
        answers = {}
        for done in as_completed(asked):
            answers[asked[done]] = done.result()
            told(answers[asked[done]])
    finally:
        pool.shutdown(cancel_futures=True)  # of those that are left after Ctrl-C
    return [answers[host] for host in hosts]


def _ask(host: str, question: Question) -> Answer:
    own = {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "LD_LIBRARY_PATH"))}
    words = ["env", *(f"{name}={value}" for name, value in own.items())]
    words += [sys.executable, "-m", "megatron_stable.launching.survey", json.dumps(asdict(question))]
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}", host, shlex.join(words)]
    began, clock = time.monotonic(), time.time()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(host, None, f"no answer over ssh within {ANSWER} s; is its disk, or its login, hanging?")
    except OSError as error:
        return Answer(host, None, f"ssh cannot be run here: {error}")
    took = time.monotonic() - began
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        return Answer(
            host, None, _why(host, done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")
        )
    try:
        survey = Survey(**json.loads(line.removeprefix(MARK)))
    except TypeError:
        return Answer(host, None, f"it has another version of megatron-stable: install the same for {sys.executable}")
    return Answer(host, survey, offset=survey.clock - (clock + took / 2), uncertain=took / 2)


def _why(host: str, said: str) -> str:
    """What came in place of an answer, and the remedy."""
    last = said.splitlines()[-1]
    remedy = next((text for mark, text in REMEDIES.items() if mark in last), "")
    return f"{last}; {remedy.format(host=host, python=sys.executable)}" if remedy else last
