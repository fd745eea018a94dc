"""Addresses of this machine. Nothing heavy is imported."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address."""
    loopback = is_loopback(address)
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            plain = entry.address.partition("%")[0]
            if plain == address or (loopback and is_loopback(plain)):
                return str(name)
    return None


def is_loopback(host: str) -> bool:
    """Whether an address reaches only the machine that it is used on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def others_reach() -> list[str]:
    """IPv4 addresses of this machine by which another may reach it."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET
    ]
    return [each for each in found if not (plain := ipaddress.ip_address(each)).is_loopback and not plain.is_link_local]
