"""What happens to a run: one type per kind of event, with its facts and the sentence that tells it.

The ledger holds events as JSON, a line each; logbook, progress line and ``--json`` are made of them. The docstrings
of the fields are the documentation of the format, docs/ledger.md. MAD: median absolute deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import Self

from megatron_stable.config.schema import ParallelConfig
from megatron_stable.stability.blend import Blend as Blend
from megatron_stable.stability.event import Event as Event
from megatron_stable.stability.event import Number, Step, one_line
from megatron_stable.stability.event import count as _count
from megatron_stable.stability.event import number as _number
from megatron_stable.stability.event import plain as _value
from megatron_stable.stability.interventions import By, Decision, Intervention
from megatron_stable.stability.surgery import Surgery as Surgery

Series: TypeAlias = Literal["loss", "grad_norm"]
WarningKind: TypeAlias = Literal["ahead", "past", "growth", "jump"]

SERIES: dict[Series, str] = {"loss": "loss", "grad_norm": "gradient norm"}


class Start(Event):
    """Training began."""

    event: Literal["start"] = "start"
    ranks: int
    """Processes that train."""
    layout: ParallelConfig
    """The section `parallel` of the configuration."""

    def words(self) -> str:
        return f"training started on {self._where()}"

    def _where(self) -> str:
        names = {"tensor": "TP", "pipeline": "PP", "sequence": "SP", "zero_stage": "ZeRO"}
        parts = [
            names.get(key, key) + ("" if value is True else f" {value}")
            for key, value in self.layout.model_dump().items()
            if value is not False
        ]
        return f"{_count(self.ranks, 'rank')} ({', '.join(parts)})"


class Resume(Start):
    """Training went on from a checkpoint."""

    event: Literal["resume"] = "resume"  # type: ignore[assignment]
    changed: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    """What the configuration has changed since that checkpoint, by key: `[before, now]`."""

    def words(self) -> str:
        changes = [f"{key} {_value(before)} → {_value(now)}" for key, (before, now) in self.changed.items()]
        return f"training resumed on {self._where()}" + (f"; changed: {', '.join(changes)}" if changes else "")


class Converted(Event):
    """The run began as another layout of a checkpoint."""

    event: Literal["converted"] = "converted"
    source: str
    """Directory of the checkpoint."""
    tensor: int
    """Ranks of tensor parallelism."""
    pipeline: int
    """Pipeline stages."""
    data: int
    """Data-parallel replicas."""

    def words(self) -> str:
        return f"converted from {self.source} to TP {self.tensor}, PP {self.pipeline}, DP {self.data}"


class Imported(Event):
    """The run began as a model of Hugging Face's."""

    event: Literal["imported"] = "imported"
    source: str
    """Directory of the model."""
    architecture: str
    """Its class."""

    def words(self) -> str:
        return f"imported {self.architecture} from {self.source}"


class _Excursion(Event):
    HEAD: ClassVar[str]

    series: Series
    """What rose."""
    value: Number
    """Its value in this step: nats per token, or the norm before clipping; `null` if it was not finite."""
    level: Number
    """Its usual level before: the median of a window."""
    scale: Number
    """Its usual noise before: the MAD, for the gradient norm that of its logarithm."""
    score: Number
    """How far above the level the value is, in MADs; `null` if it was not finite."""
    onset: Step
    """The step in which it began."""

    def words(self) -> str:
        noise = _number(self.scale) + (" (log)" if self.series == "grad_norm" else "")
        above = "up from a" if self.score is None else f"{self.score:.4g} MADs of {noise} above its"
        value = f"{_number(self.value)}, {above} level of {_number(self.level)}"
        return f"{self.HEAD.format(SERIES[self.series])}: {value}, began at step {self.onset}"


class Spike(_Excursion):
    """A series stands out above its usual level."""

    HEAD = "spike of the {}"
    event: Literal["spike"] = "spike"


class Rise(_Excursion):
    """A series has risen and stays up; whether data or state is to blame, the curve does not say."""

    HEAD = "the {} has risen and stays up"
    event: Literal["rise"] = "rise"


class Divergence(_Excursion):
    """A series has risen by more than data explain, or goes on rising."""

    HEAD = "the {} diverges"
    event: Literal["divergence"] = "divergence"


class SpikeEnd(Event):
    """A series is back at its usual level."""

    event: Literal["spike_end"] = "spike_end"
    series: Series
    """What fell back."""
    onset: Step
    """The step in which it had begun to rise."""
    duration: int
    """Steps from there until it was back."""

    def words(self) -> str:
        name, duration = SERIES[self.series], _count(self.duration, "step")
        return f"the {name} is back at its level after {duration}, up since step {self.onset}"


class SecondOpinion(Event):
    """The model was asked, forward only, about batches from before a rise of the loss and about recent ones.

    What it still finds between them is in the data: `gap` equals `rise` if the data have changed, and is 0 if the
    state has.
    """

    VERDICTS: ClassVar[dict[str, str]] = {"data": "the data are to blame", "state": "the state is to blame"}
    VERDICTS["undecided"] = "undecided"

    event: Literal["second_opinion"] = "second_opinion"
    onset: Step
    """The step in which the rise began."""
    verdict: Literal["data", "state", "undecided"]
    """What is to blame."""
    batches: int
    """Batches of each kind that it was asked about."""
    rise: Number
    """Recorded loss of the recent batches over that of the old ones, nats per token."""
    gap: Number
    """The same difference, as the model finds it now."""
    error: Number
    """Standard error of `rise - gap`."""
    healthy_gap: Number = None
    """The same difference, as a healthy checkpoint from before the rise finds it, if one was asked."""
    checkpoint: Step | None = None
    """The step of that checkpoint."""

    def words(self) -> str:
        rose = f"The loss has risen by {_number(self.rise)} nats since step {self.onset}"
        asked = f"asked about {_count(self.batches, 'batch', 'batches')} from before and {self.batches} since"
        found = f"the model finds the recent ones harder by {_number(self.gap)} ± {_number(self.error)}"
        text = f"second opinion: {self.VERDICTS[self.verdict]}. {rose}; {asked}, {found}"
        if self.checkpoint is not None:
            text += f", the checkpoint of step {self.checkpoint} by {_number(self.healthy_gap)}"
        return text


class Shift(Event):
    """The data have changed: the second opinion blames them for a rise of the loss."""

    event: Literal["shift"] = "shift"
    onset: Step
    """The step in which the rise began."""
    rise: Number
    """Nats per token."""
    sources: tuple[str, ...] = ()
    """Where the recent data come from, if that is known."""

    def words(self) -> str:
        sources = f"; recent data come from {', '.join(self.sources)}" if self.sources else ""
        return f"the data changed: the loss is up by {_number(self.rise)} nats since step {self.onset}{sources}"


class Drop(Event):
    """An update was not made."""

    event: Literal["drop"] = "drop"
    rule: str
    """Why: `non-finite loss`, `non-finite gradient` or `spike`."""
    loss: Number
    """Of that step, nats per token; `null` if it was not finite."""
    grad_norm: Number
    """Of that step, before clipping; `null` if it was not finite."""
    consecutive: int
    """Dropped updates in a row, with this one."""
    total: int
    """Dropped updates of the last 1000 steps, with this one."""
    by: By
    """Who decided."""

    def words(self) -> str:
        what = f"loss {_number(self.loss)}, gradient norm {_number(self.grad_norm)}"
        return f"{self.by} dropped the update: {self.rule} ({what}), {self.consecutive} in a row, {self.total} recently"


class _Intervening(Decision, Event):
    @classmethod
    def of(cls, intervention: Intervention, step: int) -> Self:
        """The event of an intervention."""
        return cls(step=step, **intervention.model_dump(exclude={"time", "changes"}))

    def _why(self) -> str:
        return f"{self.rule}, began at step {self.onset}" if self.onset is not None else self.rule


class Rollback(_Intervening):
    """The run went back to a checkpoint, and goes on from there otherwise; holds on every later resume."""

    event: Literal["rollback"] = "rollback"
    id: str
    """Names it, in interventions.json, checkpoints and `undo`."""
    rollback_to: Step
    """The step of the checkpoint."""

    def words(self) -> str:
        changes = [
            f"skips data steps {', '.join(f'{first}-{last}' for first, last in self.windows)}" if self.windows else "",
            f"learning rate × {_value(self.learning_rate_factor)}" if self.learning_rate_factor != 1 else "",
            f"gradient clipping × {_value(self.clip_factor)}" if self.clip_factor != 1 else "",
            "loss scale reset" if self.reset_loss_scale else "",
        ]
        text = f"{self.by} rolled back to step {self.rollback_to} ({self._why()}): "
        return text + ". ".join(filter(None, ["; ".join(filter(None, changes)), self.reason, f"id {self.id}"]))


class GaveUp(_Intervening):
    """What was tried did not help, and the run ends; it may be left at an earlier checkpoint."""

    event: Literal["gave_up"] = "gave_up"
    id: str | None = None
    """Names it, in interventions.json and checkpoints, if the run went back."""
    rollback_to: Step | None = None
    """The step of the checkpoint that the run stands at again; absent: there was none to go back to."""

    def words(self) -> str:
        to = "" if self.rollback_to is None else f" and rolled back to step {self.rollback_to}"
        return ". ".join(filter(None, [f"{self.by} gave up{to} ({self._why()})", self.reason]))


class Undo(Event):
    """A rollback was taken back."""

    event: Literal["undo"] = "undo"
    id: str
    """Of the rollback."""
    by: By
    """Who decided."""

    def words(self) -> str:
        return f"{self.by} took back rollback {self.id}"


class LossScaleFloor(Event):
    """fp16: gradients overflow although the loss scale is as low as it may be."""

    event: Literal["loss_scale_floor"] = "loss_scale_floor"
    scale: float
    """The loss scale, `precision.min_scale`."""
    module: str | None
    """The first module with values that are not finite when the step is replayed; `null`: none then."""
    norms: dict[str, Number]
    """Gradient norm by layer; `null` where it is not finite."""

    def words(self) -> str:
        norms = ", ".join(f"{layer} {_number(norm)}" for layer, norm in self.norms.items())
        return (
            f"the loss scale is at its floor, {_value(self.scale)}; first module with values that are not finite: "
            f"{self.module or 'none in a replay'}; gradient norms: {norms}"
        )


class FlightRecorded(Event):
    """Trouble began, and what was measured inside the model in the steps before was written down."""

    event: Literal["flight_recorded"] = "flight_recorded"
    file: str
    """In the run's directory."""
    first: Step
    """The first step in it."""
    last: Step
    """The last step in it."""

    def words(self) -> str:
        return f"measurements of steps {self.first} to {self.last} are in {self.file}"


class EarlyWarning(Event):
    """A measurement inside the model says what the loss does not say yet. docs/warnings.md has the rules."""

    event: Literal["warning"] = "warning"
    rule: str
    """Which rule."""
    kind: WarningKind
    """`ahead`: at this rate a threshold will be passed; `past`: it has been; `growth`: a series has multiplied since
    a step, and grows on; `jump`: it stands above its usual level."""
    tag: str
    """The series that is the first to pass, or the farthest, as in `metrics.jsonl`."""
    layers: tuple[int, ...]
    """All layers that this holds of, in the same order, counted from 0."""
    what: str
    """What is measured, in words."""
    value: Number
    """Of that series, in this step."""
    threshold: float
    """Which was passed, or will be; for `growth` and `jump` a factor."""
    falls: bool = False
    """Whether it is passed downwards."""
    at: Step | None = None
    """`ahead`: the step in which it will be passed if things go on so."""
    interval: tuple[Step, Step] | None = None
    """`ahead`: the first and the last step for that."""
    since: Step | None = None
    """`growth`: the step that it is compared with."""
    meaning: str
    """What it means for the run."""
    remedy: str
    """The configuration that treats it."""
    page: str
    """The documentation of that method."""
    track_record: tuple[int, int] | None = None
    """Of our back-test's runs in which the rule spoke: those in which the loss rose later, and all."""

    def words(self) -> str:
        first = where(self.tag)
        others = [str(layer) for layer in self.layers if f"layer_{layer:02}" not in self.tag]
        what = f"{self.what} of {first}" if first else self.what
        text = f"early warning: {what} {self._happens()}"
        if others:
            text += f"; likewise layer{'s' * (len(others) > 1)} {', '.join(others)}"
        text += f". It means: {self.meaning}. {self.remedy} treats it ({self.page})"
        if self.track_record is not None:
            right, all_ = self.track_record
            text += f"; in {right} of {_count(all_, 'run')} of our back-test in which it was said, the loss rose"
        return text

    def _happens(self) -> str:
        value, threshold = _number(self.value), f"{self.threshold:,.10g}"
        if self.kind == "ahead" and self.at is not None and self.interval is not None:
            low, high = self.interval
            return (
                f"is {value}, and at this rate {'falls below' if self.falls else 'reaches'} {threshold} at about step "
                f"{self.at:,} ({low:,}–{high:,})"
            )
        if self.kind == "growth":
            return f"is {value}, more than {threshold} times what it was at step {self.since}, and grows on"
        if self.kind == "jump":
            return f"is {value}, for its learning rate more than {threshold} times its usual level"
        return f"is {value}, {'below' if self.falls else 'above'} {threshold}"


class SaveFailed(Event):
    """A checkpoint could not be written; training goes on without it, up to `checkpoint.max_failed_saves` in a row."""

    event: Literal["save_failed"] = "save_failed"
    reason: str
    """In words."""
    consecutive: int
    """Failed saves in a row, with this one."""

    def words(self) -> str:
        return f"{self.reason}; {self.consecutive} in a row"


class _Long(Event):
    after: bool = False
    """Whether it was not the step itself but what follows it: an evaluation, a checkpoint."""
    seconds: float
    """For so long."""

    def _what(self) -> str:
        return "what follows it " if self.after else ""


class Waiting(_Long):
    """Something takes long, and goes on; on record once, when it is first noticed."""

    event: Literal["waiting"] = "waiting"
    ranks: tuple[int, ...]
    """Those that the others wait for; empty: none stands out."""
    who: str
    """The same in words, with their machines and what is known of them."""

    def words(self) -> str:
        whom = f"waiting for {self.who}" if self.ranks else "no rank stands out"
        return f"{self._what()}has taken {self.seconds:.0f} s; {whom}"


class WentOn(_Long):
    """What took long went on after all."""

    event: Literal["went_on"] = "went_on"

    def words(self) -> str:
        return f"{self._what()}went on after {self.seconds:.0f} s"


class Stop(Event):
    """The run ended before its last step."""

    event: Literal["stop"] = "stop"
    exit_code: int
    """Of the process."""
    reason: str
    """In words."""
    stacks: dict[str, str] | None = None
    """Where the ranks stood, by their numbers in words, if one was lost: the innermost calls of each, the last one
    lowest. Of eight places at most, those that the fewest share."""

    def words(self) -> str:
        return f"stopped with exit code {self.exit_code}: {self.reason}"


class Unknown(Event):
    """A line that is none of the above, as it was found: of another version or program."""

    time: Any = None
    event: Any = None
    step: Any = None
    data_step: Any = None
    facts: dict[Any, Any] = Field(default_factory=dict)
    """All else."""

    def sentence(self) -> str:
        places = {"step": self.step, "data step": self.data_step}
        where = ", ".join(f"{name} {_value(value)}" for name, value in places.items() if value is not None)
        return one_line(f"{where}: {self.words()}" if where else self.words())

    def words(self) -> str:
        facts = "; ".join(f"{key} {_value(value)}" for key, value in self.facts.items())
        name = "an event without a name" if self.event is None else _value(self.event)
        return f"{name} ({facts})" if facts else name

    def line(self) -> dict[str, Any]:
        own = {"time": self.time, "event": self.event, "step": self.step, "data_step": self.data_step}
        return {key: value for key, value in own.items() if value is not None} | self.facts


AnyEvent: TypeAlias = Annotated[
    Start | Resume | Blend | Converted | Imported | Spike | Rise | Divergence | SpikeEnd | SecondOpinion | Shift | Drop
    | Rollback | GaveUp | Surgery | Undo | LossScaleFloor | FlightRecorded | EarlyWarning | SaveFailed | Waiting
    | WentOn | Stop,
    Field(discriminator="event"),
]  # fmt: skip
_KNOWN: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def parse(line: Mapping[str, Any]) -> Event:
    """The event that a line of the ledger holds; whatever it holds, this is no error."""
    try:
        return _KNOWN.validate_python(line)
    except ValidationError:
        own = {key: line.get(key) for key in Event.model_fields}
        return Unknown(**own, facts={key: value for key, value in line.items() if key not in own})


def where(tag: str) -> str:
    """Which part of the model the tag of a probe is of, in words; nothing if it is of all."""
    names = {"qkv": "QKV", "proj": "Proj", "fc1": "FC1", "fc2": "FC2", "embedding": "the embedding", "head": "the head"}
    parts = tag.split("/")
    point = next((names.get(part, part) for part in parts[1:-1] if part in names), "")
    layer = next((f"layer {int(part[6:])}" for part in parts if part.startswith("layer_")), "")
    if not layer:
        return names.get(parts[-1], "")
    return f"{point} in {layer}" if point else layer
