"""Every knob of the function and of its training is in a case that holds it against the reference on every layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest

from megatron_stable.config.schema import Config, Section
from tests.engine import test_equivalence, test_recipes
from tests.optim import test_rules_layouts

# what needs no layout test of its own, and why
EXCEPT = {
    "model.size": "names other fields",
    "model.vocab_size": "the tests' own",
    "model.attention": "backends agree: tests/model/test_backends.py, tests/gpu",
    "model.compile": "tests/model/test_compile.py",
    "model.dropout": "tests/engine/test_dropout.py",
    "model.attention_dropout": "tests/engine/test_dropout.py",
}


def configurations() -> Iterator[Config]:
    for name in test_recipes.CASES:
        yield test_recipes.to_config(name, "tp2_pp2_sp")
    for case in test_equivalence.all_pairs_cases():
        yield test_equivalence.to_config(case)
    for rule in test_rules_layouts.RULES:
        yield test_rules_layouts.config_of(rule, "tp2_pp2_zero1")


def fields() -> Iterator[tuple[str, str, Any]]:
    for section in ("model", "loss", "optimizer", "schedule"):
        kind: type[Section] = type(getattr(Config(), section))
        yield from ((section, name, field) for name, field in kind.model_fields.items())


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, n, _ in fields() if f"{s}.{n}" not in EXCEPT])
def test_every_knob_is_turned_in_a_case_of_all_layouts(section: str, name: str) -> None:
    annotation = next(field.annotation for s, n, field in fields() if (s, n) == (section, name))
    seen = {str(getattr(getattr(config, section), name)) for config in configurations()}
    assert len(seen - {str(getattr(getattr(Config(), section), name))}) >= 1, "only its default is tested"
    if get_origin(annotation) is Literal:
        assert set(map(str, get_args(annotation))) <= seen
    elif annotation is bool:
        assert seen == {"False", "True"}
