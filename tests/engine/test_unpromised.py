"""Each private part of DeepSpeed that the engine uses is looked for at the start, and named where it is gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import deepspeed

from megatron_stable.engine import unpromised
from tests.engine.layouts import make_config
from tests.harness.ranks import Ranks

ROOT = Path(__file__).parents[2]
LAYOUTS: dict[str, dict[str, Any]] = {
    "PIPELINE": {"parallel": {"pipeline": 2, "zero_stage": 1}},
    "PIPELINE_ENGINE": {"parallel": {"pipeline": 2, "zero_stage": 1}},
    "ENGINE": {},
    "BF16_ZERO_1": {"precision": {"dtype": "bf16"}, "parallel": {"zero_stage": 1}},
    "FP32_ZERO_1": {"precision": {"dtype": "fp32"}, "parallel": {"zero_stage": 1}},
    "ZERO_1_2": {"parallel": {"zero_stage": 2}},
    "ZERO_3": {"parallel": {"zero_stage": 3}},
    "FRAGMENT": {"parallel": {"zero_stage": 1}},
}


def refusals(layouts: dict[str, dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """On a rank: what engines say when a part that each table names is gone."""
    from megatron_stable.engine.engine import Engine
    from megatron_stable.errors import ConfigError
    from megatron_stable.parallel.topology import Topology

    said = {}
    for table, values in layouts.items():
        config = make_config(**values)
        topology = Topology(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence)
        whole = getattr(unpromised, table)
        Engine(config, topology)
        setattr(unpromised, table, (*whole, "moved_elsewhere"))
        try:
            Engine(config, topology)
        except ConfigError as error:
            said[table] = str(error), error.agreed
        finally:
            setattr(unpromised, table, whole)
    return said


def test_what_is_gone_is_named_with_the_version(ranks: Ranks) -> None:
    for said in ranks.run(2, refusals, LAYOUTS):
        assert sorted(said) == sorted(LAYOUTS)
        for error, agreed in said.values():
            assert agreed
            assert re.match(rf"DeepSpeed {re.escape(deepspeed.__version__)} has no \w+\.moved_elsewhere, which", error)


def test_what_is_accepted_is_what_was_tested() -> None:
    assert f'"deepspeed{unpromised.KNOWN}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_every_private_name_of_deepspeed_is_looked_for() -> None:
    looked_for = {name for value in vars(unpromised).values() if isinstance(value, tuple) for name in value}
    looked_for |= {"_hp_mapping", "_global_grad_norm", "_hp_grad"}  # the last is made, for DeepSpeed to find
    own: set[str] = set()
    used: set[str] = set()
    for path in (ROOT / "megatron_stable/engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (own if on_self and isinstance(node.ctx, ast.Store) else used).add(node.attr)
    others = {name for name in used if name.startswith("_foreach")} | {"_replace"}  # of torch, of Python
    assert used - own - others <= looked_for
    assert {"_hp_mapping", "_reassign_or_swap_out_partitioned_parameters"} <= used
