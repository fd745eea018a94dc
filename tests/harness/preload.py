"""Imported once by the fork server, so that each rank starts with torch and DeepSpeed in memory.

Nothing here may start a thread or run an operator: a fork copies neither threads nor their locks.
"""

import contextlib
import importlib

# The imports that building an engine and stepping an optimizer trigger lazily; 0.8 s per rank if left to them.
LAZILY_IMPORTED = (
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.profiler._cupti_monitor",
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "pytest",
)

for _name in LAZILY_IMPORTED:
    with contextlib.suppress(ImportError):  # the private ones come and go with the version
        importlib.import_module(_name)

with contextlib.suppress(ImportError):
    import deepspeed.ops

    # DeepSpeed would compile a C++ kernel (40 s, once per machine) that only its inference all-reduce calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
