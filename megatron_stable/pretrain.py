"""``megatron_stable.pretrain`` as a module for any launcher.

::

    deepspeed --hostfile hosts --module megatron_stable.pretrain --config 10b.yaml run.steps=5000
    torchrun --nproc-per-node 8 -m megatron_stable.pretrain --config 10b.yaml
    srun python -m megatron_stable.pretrain --config 10b.yaml
"""

from __future__ import annotations

import argparse
import sys

from megatron_stable.errors import MegatronStableError, not_installed


def main() -> int:
    """Parse the command line of one rank and train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron_stable.pretrain", description="Train on this rank of a launcher.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a field: run.steps=5000")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    given = parser.parse_args()
    try:
        from megatron_stable.config.load import load_config
        from megatron_stable.parallel.launcher import refuse
        from megatron_stable.training.pretrain import run_to_exit_code
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error)}", file=sys.stderr, flush=True)
        return 2
    try:
        config = load_config(given.config, given.overrides)
    except MegatronStableError as error:
        return refuse(str(error), error.exit_code)
    return run_to_exit_code(config)


if __name__ == "__main__":
    sys.exit(main())
