"""YAML as configurations use it: the safe subset, with the numbers and flags of YAML 1.2.

In YAML 1.1, as PyYAML reads it, 3e-4 is text, 1:30 is the integer 90, and `no` is false.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml


def parse(text: str | bytes) -> Any:
    """The value that `text` denotes. Raises yaml.YAMLError where it denotes none, or gives a key twice."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506, a SafeLoader
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets thousands deep
        raise yaml.YAMLError(str(error)) from error


def dump(value: Any) -> str:
    """`value` as YAML, lists inline, that :func:`parse` and readers of YAML 1.1 make the same of."""
    return _dump(value, default_flow_style=False)


def inline(value: Any) -> str:
    """`value` as YAML on one line, as a user would write it."""
    return _dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _dump(value: Any, default_flow_style: bool) -> str:
    for allow_unicode in (True, False):
        text = yaml.dump(
            value,
            Dumper=_Dumper,
            sort_keys=False,
            width=float("inf"),
            allow_unicode=allow_unicode,
            default_flow_style=default_flow_style,
        )
        if not set(text) & set("\x85\u2028\u2029"):  # line breaks to YAML, which would not come back
            break
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other implicit types (below), which refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; raises ConstructorError where a key comes twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, and quotes what either version of YAML would not read as text."""


_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_SCALARS = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
]
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
