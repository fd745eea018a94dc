"""The fields of the schema in plain words, for error messages, the reference page and commented files."""

import types
from collections.abc import Iterator
from inspect import cleandoc
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_stable.config.notation import inline
from megatron_stable.config.schema import Config

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_NAMES = {
    int: "an integer",
    float: "a number",
    Any: "any value",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


class Entry(NamedTuple):
    """A key of the configuration: its section and name, and the field behind it."""

    section: str
    name: str
    info: FieldInfo

    @property
    def key(self) -> str:
        """The dotted key, as an override names it."""
        return f"{self.section}.{self.name}"

    @property
    def doc(self) -> str:
        """The field's documentation, on one line."""
        return " ".join(cleandoc(self.info.description or "").split())

    @property
    def allowed(self) -> str:
        """What the field accepts, such as ``an integer >= 1 or null``."""
        return describe(self.info.annotation, self.info.metadata)


def sections() -> dict[str, str]:
    """Every section of the configuration with its documentation, in order."""
    return {name: cleandoc(field.description or "") for name, field in Config.model_fields.items()}


def entries(section: str | None = None) -> Iterator[Entry]:
    """Every key, in the order of the schema; only those of `section` if it is given."""
    for name, field in Config.model_fields.items():
        if section in (None, name):
            assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            for key, info in field.annotation.model_fields.items():
                yield Entry(name, key, info)


def accepts_text(info: FieldInfo) -> bool:
    """Whether the field takes any text, so that an override such as `run.directory=7` means the text."""
    return str in (info.annotation, *get_args(info.annotation))


def describe(annotation: Any, metadata: Any = ()) -> str:
    """What a field of a type accepts, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(args[0], [m for extra in args[1:] for m in getattr(extra, "metadata", [extra])])
    if origin is Union or origin is types.UnionType:
        return " or ".join(describe(arg, metadata) for arg in args)
    if origin is Literal:
        return args[0] if len(args) == 1 else "one of " + ", ".join(inline(arg) for arg in args)
    if origin is tuple and Ellipsis in args:
        return f"a list of {describe(args[0]).replace('one of ', '')}"
    if origin is tuple:
        return f"[{', '.join(describe(arg) for arg in args)}]"
    if origin is dict:
        return f"{{{describe(args[0])}: {describe(args[1])}, ...}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "an object"
    bounds = [f"{sign} {getattr(m, name):g}" for m in metadata for name, sign in _BOUNDS.items() if hasattr(m, name)]
    numeric = annotation in (int, float)
    return " ".join([_NAMES[annotation], " and ".join(bounds)]).strip() if numeric else _NAMES[annotation]
