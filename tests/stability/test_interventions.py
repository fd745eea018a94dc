from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import Course, SkipWindows
from megatron_stable.stability.interventions import Intervention, Interventions


def made(name: str, rollback_to: int, *windows: tuple[int, int], size: int = 1, **changes: Any) -> Intervention:
    """In a run whose batches always had `size` samples."""
    return Intervention(
        id=name, time="2026-01-01T00:00:00+00:00", by="guard", rule="divergence", rollback_to=rollback_to,
        windows=windows, samples=tuple(((first - 1) * size, last * size) for first, last in windows), **changes,
    )  # fmt: skip


def test_undoing_takes_the_last_back() -> None:
    done = Interventions().add(made("a", 300, (301, 500))).add(made("b", 200, (900, 901), learning_rate_factor=0.5))
    assert done.skip == SkipWindows([(300, 500), (899, 901)])
    assert done.undone() == Interventions(done.items[:1])


def test_factors_multiply() -> None:
    done = Interventions(
        (made("a", 0, learning_rate_factor=0.5), made("b", 0, learning_rate_factor=0.5, clip_factor=0.1))
    )
    assert (done.learning_rate_factor, done.clip_factor) == (0.25, 0.1)
    assert (Interventions().learning_rate_factor, Interventions().clip_factor) == (1, 1)


def test_the_line_of_checkpoints() -> None:
    first, second = made("a", 300), made("b", 200)
    one, two = Interventions((first,)), Interventions((first, second))
    assert one.holds(300, ())
    assert not one.holds(400, ()), "written before the rollback to 300, and after it in steps"
    assert one.holds(400, (first,))
    assert not two.holds(300, (first,))
    assert not two.holds(300, ()), "the first rollback allows it, the second does not"
    assert two.holds(200, ())
    assert two.holds(999, (first, second))
    assert not one.holds(999, (first, second)), "the second was undone, and what came of it with it"
    assert not one.holds(1, (second,))


class Stored(NamedTuple):
    """What of a checkpoint matters here."""

    course: Course
    before: Interventions
    seen: dict[int, tuple[int, ...]]  # samples by step, that its weights come from


class Run:
    """A run that is started, stopped, killed and sent back, but for the training: which data does it see?"""

    def __init__(self, every: int) -> None:
        self.every, self.ids, self.size = every, 0, 3
        self.configured: list[tuple[int, int]] = []
        self.meant: dict[tuple[int, int], tuple[int, int]] = {}
        self.done = Interventions()
        self.stored: dict[int, Stored] = {}
        self.farthest = 0  # sample that was ever seen
        self.start()

    def start(self) -> None:
        """As `Trainer.resume` does."""
        usable = [step for step, entry in self.stored.items() if self.done.holds(step, entry.before.items)]
        self.step = max(usable, default=0)
        entry = self.stored[self.step] if self.step else Stored(Course.begin(self.size), Interventions(), {})
        known = tuple(self.meant.items())
        self.course = entry.course.resumed(self.step, self.size, self.configured, self.done.skip, known)
        self.seen = dict(entry.seen)

    def train(self, steps: int, killed: bool) -> None:
        """On from where it stands; a run that is stopped writes a checkpoint, one that is killed does not."""
        for _ in range(steps):
            self.step += 1
            self.seen[self.step] = tuple(k for piece in self.course.samples(self.step) for k in piece)
            self.farthest = max(self.farthest, self.seen[self.step][-1])
            if self.step % self.every == 0:
                self.save()
        if not killed:
            self.save()
        self.start()

    def save(self) -> None:
        if self.step:
            self.stored[self.step] = Stored(self.course, self.done, dict(self.seen))
            top = max(step for step, entry in self.stored.items() if self.done.holds(step, entry.before.items))
            for step, entry in list(self.stored.items()):  # as rotation does
                if step < top and not self.done.holds(step, entry.before.items):
                    del self.stored[step]

    def configure(self, ahead: int, long: int) -> None:
        """The user names data steps that lie ahead of all that was trained on."""
        first = max(self.course.data_steps(self.farthest, self.farthest + 1)) + ahead
        if (first, first + long) not in self.configured:
            self.meant[first, first + long] = self.course.stretch(first, first + long)
            self.configured.append((first, first + long))
            self.start()

    def intervention(self, window: tuple[int, int]) -> bool:
        """By recovery or the tool: go back to a checkpoint from before the window."""
        samples = self.course.stretch(*window)
        usable = [step for step, entry in self.stored.items() if self.done.holds(step, entry.before.items)]
        before = [step for step in usable if self.stored[step].course.position(step) <= samples[0]]
        if before:
            self.ids += 1
            item = made(str(self.ids), max(before), window).model_copy(update={"samples": (samples,)})
            self.done = self.done.add(item)
            self.start()
        return bool(before)

    def undo(self) -> None:
        self.done = self.done.undone()
        self.start()


lengths = st.integers(0, 6)
turns = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 15), st.just(0)),
    st.tuples(st.just("kill"), st.integers(1, 15), st.just(0)),
    st.tuples(st.just("resize"), st.integers(1, 9), st.just(0)),
    st.tuples(st.just("configure"), st.integers(1, 20), lengths),
    st.tuples(st.just("intervention"), st.integers(1, 60), lengths),
    st.tuples(st.just("regret"), st.integers(1, 60), lengths),
    st.tuples(st.just("undo"), st.just(0), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.lists(turns, min_size=1, max_size=12))
def test_the_order_is_that_of_knowing_all_windows_from_the_start(every: int, turns: list) -> None:
    """Random windows, by the configuration at stops and by interventions that go back, some undone; random stops, kills
    and batch sizes."""
    run = Run(every)
    for kind, at, long in turns:
        if kind in ("train", "kill"):
            run.train(at, killed=kind == "kill")
        elif kind == "resize":
            run.size = at
            run.start()
        elif kind == "configure":
            run.configure(at, long)
        elif kind == "intervention":
            run.intervention((at, at + long))
        elif kind == "regret":
            if run.intervention((at, at + long)):
                run.train(at + 5, killed=False)
                run.undo()
        elif run.done.items:
            run.undo()
    run.train(10, killed=False)
    out = SkipWindows([*run.meant.values(), *run.done.skip.stretches])
    seen = [k for step in sorted(run.seen) for k in run.seen[step]]
    assert seen == [k for piece in out.take(0, len(seen)) for k in piece], "each sample once but those, in order"
    assert list(run.seen) == list(range(1, run.step + 1))
    stored = run.stored[run.step].course
    assert stored.trained(run.step) == len(seen) and stored.windows == out


def test_checkpoints_from_before_surgery_are_of_another_model() -> None:
    changed = {"model.qk_norm": (False, True)}
    first = made("a", 300)
    surgery = made("b", 200).model_copy(update={"changes": changed})
    two = Interventions((first, surgery))
    assert not two.holds(100, ())
    assert not two.holds(200, (first,)), "even that of the step that was operated on"
    assert two.holds(200, (first, surgery))
    assert two.changes == {"model.qk_norm": True}
    assert first.changes == {}


def test_what_surgery_changed_holds_unless_it_is_given_anew() -> None:
    first = {"model.qk_norm": (False, True), "schedule.rewarm": (None, [20, 4])}
    done = Interventions((made("a", 20, changes=first), made("b", 40, changes={"schedule.rewarm": ([20, 4], [40, 4])})))

    def applied(qk_norm: bool, rewarm: list[int] | None) -> dict[str, object]:
        return done.applied({"model": {"qk_norm": qk_norm}, "schedule": {"rewarm": rewarm}})

    assert applied(False, None) == done.changes == {"model.qk_norm": True, "schedule.rewarm": [40, 4]}
    assert applied(True, [40, 4]) == {}
    assert applied(False, [90, 9]) == {"model.qk_norm": True}
