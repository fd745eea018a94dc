#!/usr/bin/env python3
"""The data-skipping restart tool: `megatron-stable skip` under a name of its own.

python tools/skip_data.py RUN --from-step 40701 --to-step 40900 --apply
"""

import sys

from megatron_stable.commands.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "skip")
    main()
