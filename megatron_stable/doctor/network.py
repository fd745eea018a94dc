"""How this machine is connected: names, interfaces, what NCCL is told."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_stable.doctor.bounded import Late, within
from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Finding, Verdict
from megatron_stable.parallel.addresses import is_loopback

INFINIBAND = Path("/sys/class/infiniband")


def check_network(crew: Crew) -> list[Finding]:
    """Of this machine."""
    return [_interface(crew), *_name(crew), *_nccl(crew)]


def _interface(crew: Crew) -> Finding:
    """The interface by which this machine reaches rank 0's, which gloo is told to use when ranks meet."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    state = psutil.net_if_stats().get(name)
    if state is None:
        text = f"GLOO_SOCKET_IFNAME is {name!r}, and no such interface is here" if name else "not known"
        return Finding("interface", text, Verdict.WARNING, "unset GLOO_SOCKET_IFNAME, or name one of: ip -brief link")
    several = len(crew.leaders) > 1
    speed = f", {state.speed / 1000:g} Gbit/s" if state.speed else ""
    text = f"{name} leads to rank 0{speed}, MTU {state.mtu}"
    if several and state.speed and state.speed < 10_000 and crew.on_gpu:
        remedy = "GPUs wait for it: is there a faster one? Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to it"
        return Finding("interface", text, Verdict.WARNING, remedy)
    return Finding("interface", text)


def _name(crew: Crew) -> Iterator[Finding]:
    """What this machine takes its own name for."""
    try:
        address = within(10, lambda: socket.gethostbyname(socket.gethostname()))
    except Late:
        text, remedy = "its own name: the name server does not answer", "see /etc/resolv.conf, or add it to /etc/hosts"
        yield Finding("host name", text, Verdict.WARNING, remedy)
        return
    except OSError as error:
        text = f"its own name has no address: {error.strerror}"
        yield Finding("host name", text, Verdict.WARNING, "add it to /etc/hosts, with the machine's address")
        return
    if is_loopback(address) and len(crew.leaders) > 1:
        text = f"its own name means {address}, where no other machine reaches it; ranks are told the interface instead"
        remedy = "other programs may trip over it: give the name the machine's address in /etc/hosts"
        yield Finding("host name", text, Verdict.OK, remedy)
    else:
        yield Finding("host name", "its own name has an address")


def _nccl(crew: Crew) -> Iterator[Finding]:
    if not crew.on_gpu:
        return
    told = {key: value for key, value in sorted(os.environ.items()) if key.startswith("NCCL_")}
    text = " ".join(f"{key}={value}" for key, value in told.items()) or "no variable NCCL_* is set"
    if told.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        yield Finding("NCCL", text, Verdict.WARNING, "NCCL_DEBUG fills the output of a long run: WARN", alike=True)
    else:
        yield Finding("NCCL", text, alike=True)
    devices = sorted(each.name for each in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    down = [each for each in devices if not _active(each)]
    text = f"{len(devices)} devices" + (f", of which down: {', '.join(down)}" if down else "")
    if not devices and len(crew.leaders) > 1:
        remedy = "between machines NCCL takes TCP, which is slower; in a container: --device=/dev/infiniband"
        yield Finding("InfiniBand", "no device", Verdict.WARNING, remedy, alike=True)
    elif devices:
        verdict = Verdict.WARNING if down else Verdict.OK
        yield Finding("InfiniBand", text, verdict, "see ibstat" if down else "", alike=True)


def _active(device: str) -> bool:
    """Whether any port of an InfiniBand device is up."""
    for state in (INFINIBAND / device / "ports").glob("*/state"):
        try:
            if "ACTIVE" in state.read_text():
                return True
        except OSError:
            continue
    return False
