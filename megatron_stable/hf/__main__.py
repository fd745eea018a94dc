"""Any Python program, with this package's class registered: `python -m megatron_stable.hf lm_eval --model hf ...`."""

from __future__ import annotations

import runpy
import sys

import megatron_stable.hf  # noqa: F401  (registers the class)

USAGE = """Usage: python -m megatron_stable.hf MODULE [ARGUMENTS]...

Run a Python module as `python -m MODULE` does, with this package's class registered in transformers.

Example:
  python -m megatron_stable.hf lm_eval --model hf --model_args pretrained=models/first --tasks hellaswag"""

if __name__ == "__main__":
    del sys.argv[0]
    if not sys.argv or sys.argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if sys.argv else sys.stderr)
        sys.exit(0 if sys.argv else 2)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
