"""``megatron_stable.doctor`` as a module for any launcher.

::

    deepspeed --hostfile hosts --module megatron_stable.doctor --config 10b.yaml
    torchrun --nproc-per-node 8 -m megatron_stable.doctor --config 10b.yaml
    srun python -m megatron_stable.doctor --config 10b.yaml
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from megatron_stable.config.load import load_config
from megatron_stable.errors import MegatronStableError
from megatron_stable.parallel.launcher import refuse


def main() -> int:
    """Parse the command line of one rank and examine it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron_stable.doctor", description="Examine this rank of a launcher.")
    parser.add_argument("--config", metavar="FILE", help="the YAML of the run to come")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="whose file system to examine, not the run's")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a field: parallel.tensor=2")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    given = parser.parse_intermixed_args()
    try:
        config = load_config(given.config, given.overrides) if given.config or given.overrides else None
    except MegatronStableError as error:
        return refuse(str(error), error.exit_code)
    from megatron_stable.training.pretrain import to_exit_code

    def work(tell: object) -> int:  # it has no errors that all ranks share after they have met
        from megatron_stable.doctor.examination import examine

        return examine(config, given.directory, given.json)

    try:
        return to_exit_code(work)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise


if __name__ == "__main__":
    sys.exit(main())
