"""What all events of a run have, and how their values are put into words."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megatron_stable.numbers import finite

Number: TypeAlias = Annotated[float | None, AfterValidator(finite)]  # null where it was not finite
Step: TypeAlias = Annotated[int, Field(ge=0)]


class Event(BaseModel, ABC):
    """What all events have."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    time: str | None = None
    """When it was written to the ledger: ISO 8601, UTC."""
    event: str
    """The kind."""
    step: Step
    """The optimizer step in which it happened; 0: before the first."""
    data_step: Step | None = None
    """The position of that step in the data order."""

    def sentence(self) -> str:
        """What happened, in plain words, with step and numbers; one line, safe on a terminal."""
        data = f" (data step {self.data_step})" if self.data_step is not None else ""
        return one_line(f"step {self.step}{data}: {self.words()}")

    @abstractmethod
    def words(self) -> str:
        """The sentence, without the step."""

    def line(self) -> dict[str, Any]:
        """Plain values for JSON, without what there is nothing to say about."""
        required = {name for name, field in type(self).model_fields.items() if field.is_required()}
        return {
            key: value for key, value in self.model_dump(mode="json").items() if value is not None or key in required
        }


def one_line(text: str) -> str:
    """Text on one line, with what does not print, or would steer a terminal, as Python's escapes."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in line)


def count(number: int, one: str, more: str = "") -> str:
    """A number of things."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def number(value: float | None) -> str:
    """Four significant digits; from a thousand on, to the unit."""
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def plain(value: Any) -> str:
    """Any value of a field, briefly."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return number(finite(value))
    return json.dumps(value, default=str)
