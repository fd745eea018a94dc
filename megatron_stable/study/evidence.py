"""What speaks for a value of the configuration: findings, their sources, and how sure these make it.

How sure a value is follows from its sources alone (`sureness`): whether the paper or its code was read, or only a text
about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config, ModelConfig

SURE = {
    "strong": "several independent works that were read, or your own sweep",
    "paper": "one work that was read",
    "second-hand": "known from texts about the paper, not from the paper",
    "convention": "no source; what is usual, or what you had",
    "yours": "what you asked for",
    "at risk": "your own sweep, which does not call it stable",
}


class Source(NamedTuple):
    """Who found it.

    Attributes:
        work: Two sources of one work are not independent.
        how: read: in the paper. code: in its authors' code, configurations or logs. measured: by this project.
            second-hand: in texts about it. yours: asked for.
    """

    work: str
    how: Literal["read", "code", "measured", "second-hand", "yours"]


@dataclass(frozen=True)
class At:
    """What values are chosen for.

    Attributes:
        config: As it is before anything is recommended.
        parameters: Outside embedding and head, as all sizes here are counted.
        tokens: To be trained on.
        batch_tokens: Of a step, if asked for.
        chosen: Values by dotted key, so far.
    """

    config: Config
    parameters: float
    tokens: float
    batch_tokens: float | None = None
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Of training, embedding and head left out: 6 for each parameter, and attention, as arXiv 2401.02954 counts."""
        model = self.config.model
        return (6 * self.parameters + 12 * model.layers * model.hidden * model.sequence_length) * self.tokens

    @property
    def plain(self) -> bool:
        """Whether the model is what its recipe says, with no knob turned by hand."""
        return follows_recipe(self.config.model)

    @property
    def bounded(self) -> bool:
        """Whether something bounds attention logits already."""
        model = self.config.model
        return model.qk_norm or model.attention_cap is not None or self.config.optimizer.qk_clip is not None


@dataclass(frozen=True)
class Finding:
    """A sentence with numbers, and its source.

    Attributes:
        where: In the work.
        supports: Whether it speaks for the value; if not, it is there to be weighed against it.
    """

    says: str | Callable[[At], str]
    source: Source
    where: str = ""
    supports: bool = True

    def sentence(self, at: At) -> str:
        """As people read it, with where it is from."""
        says = self.says if isinstance(self.says, str) else self.says(at)
        work, how = self.source
        marks = {"code": "code", "second-hand": "second-hand", "measured": "measured here"}
        cited = ", ".join(filter(None, (work, self.where, marks.get(how))))
        return f"{says} ({cited})"


@dataclass(frozen=True)
class Entry:
    """A field.

    Attributes:
        rule: Its value.
        changes: What would make another value better.
        applies: To which configurations; of several entries for a field, the first that applies counts.
    """

    key: str
    rule: Callable[[At], Any]
    findings: tuple[Finding, ...]
    changes: str | Callable[[At], str]
    applies: Callable[[At], bool] = lambda at: True


def sureness(findings: Iterable[Finding]) -> str:
    """How sure a value is, a word of ``SURE``."""
    found = [finding.source for finding in findings if finding.supports]
    if any(source.how == "yours" for source in found):
        return "yours"
    firm = {source.work for source in found if source.how in ("read", "code", "measured")}
    if firm:
        return "strong" if len(firm) > 1 else "paper"
    return "second-hand" if found else "convention"


def follows_recipe(model: ModelConfig) -> bool:
    """Whether all that recipes set is as the model's recipe has it."""
    named = ModelConfig(size=model.size, recipe=model.recipe)
    return all(getattr(model, name) == getattr(named, name) for knobs in RECIPES.values() for name in knobs)


class Value(NamedTuple):
    """A field, as it is recommended.

    Attributes:
        evidence: Sentences with numbers and sources.
        sure: A word of ``SURE``.
        changes: What would make another value better.
    """

    key: str
    value: Any
    evidence: str
    sure: str
    changes: str
