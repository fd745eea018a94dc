"""Where rank 0 is, by word of MPI, for launchers that do not say it. MPI is used for this alone, and left at once."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megatron_stable.errors import JoinError
from megatron_stable.parallel.addresses import others_reach

ANSWERS = 3.0  # seconds in which an address does


def address_of_rank_0(size: int) -> str:
    """The first address of rank 0's machine that answers this one. Collective over all ranks of MPI.

    Rank 0 listens while all others try its addresses in turn: what its name means elsewhere, or which of its networks
    leads where, nobody else can know. MPI is begun and ended within; a rank that dies meanwhile ends all, by mpirun.

    Args:
        size: Ranks, by the launcher.

    Raises:
        ImportError, RuntimeError: On this rank: no mpi4py, or no MPI that it can load, or another than the launcher's.
        JoinError: On all ranks alike: an address that answers is missing somewhere.
    """
    from mpi4py import MPI

    world, here = MPI.COMM_WORLD, socket.gethostname()
    if world.Get_size() != size:  # each rank by itself: its MPI does not know who started it
        raise RuntimeError(f"mpi4py is built for another MPI than the one that started these {size} ranks")
    if world.Get_rank() == 0:
        with _doorman() as (port, token):
            host, candidates, *_ = world.bcast((here, others_reach(), port, token), root=0)
            found = world.allgather((here, None))  # all have tried by then
    else:
        host, candidates, port, token = world.bcast(None, root=0)
        found = world.allgather((here, next((each for each in candidates if _answers(each, port, token)), None)))
    own = found[world.Get_rank()][1]
    MPI.Finalize()
    if missing := sorted({name for name, address in found[1:] if address is None}):
        error = JoinError(
            f"none of the addresses of rank 0 on {host} ({', '.join(candidates)}) answers on {', '.join(missing)}: set "
            "MASTER_ADDR to one that does (mpirun -x MASTER_ADDR=HOST …), or see to the network or its firewall"
        )
        error.agreed = True
        raise error
    # on the machine of rank 0 all of its addresses answer: take one that others reach, too
    away = next((address for name, address in found if name != host), None)
    return str(away if here == host and away else own or found[-1][1])


@contextmanager
def _doorman() -> Iterator[tuple[int, str]]:
    """Someone on this machine who tells whoever comes a secret: (port, secret)."""
    token = secrets.token_hex(8)
    with socket.create_server(("", 0), backlog=4096) as server:

        def greet() -> None:
            with suppress(OSError):  # closed
                while True:
                    with server.accept()[0] as line, suppress(OSError):
                        line.sendall(token.encode())

        threading.Thread(target=greet, name="doorman", daemon=True).start()
        try:
            yield server.getsockname()[1], token
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes the thread


def _answers(address: str, port: int, token: str) -> bool:
    try:
        with socket.create_connection((address, port), timeout=ANSWERS) as line:
            return line.makefile("rb").read(len(token)) == token.encode()
    except OSError:
        return False
