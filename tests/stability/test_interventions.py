from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data.skip import SkipWindows
from megatron_stable.stability.interventions import Intervention, Interventions


def made(name: str, rollback_to: int, *windows: tuple[int, int], **changes: float) -> Intervention:
    return Intervention(
        id=name, time="2026-01-01T00:00:00+00:00", by="guard", rule="divergence", rollback_to=rollback_to,
        windows=windows, **changes,
    )  # fmt: skip


def test_undoing_takes_the_last_back() -> None:
    done = Interventions().add(made("a", 300, (301, 500))).add(made("b", 200, (900, 901), learning_rate_factor=0.5))
    assert done.skip == SkipWindows([(301, 500), (900, 901)])
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


windows = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9)).map(lambda w: (w[0], w[0] + w[1])), max_size=5)


@given(windows, windows, st.integers(0, 40))
def test_windows_ahead_change_nothing_that_was_trained(old: list, new: list, step: int) -> None:
    trained = SkipWindows(old)
    position = trained.data_step(step) if step else 0
    then = trained.continued(position, SkipWindows(new))
    assert [then.data_step(s) for s in range(1, step + 1)] == [trained.data_step(s) for s in range(1, step + 1)]
    assert step == 0 or then.step(position) == step
    for data_step in range(position + 1, 120):
        assert (data_step in then) == (data_step in SkipWindows(new))


@given(windows, st.integers(1, 40))
def test_windows_set_before_the_start_or_at_a_stop_give_one_order(ahead: list, step: int) -> None:
    """A stop before the first window: as if it had been known from the start."""
    first = min((first for first, _ in ahead), default=10**6)
    stop = min(step, first - 1)
    from_start = SkipWindows().continued(0, SkipWindows(ahead))
    at_stop = SkipWindows().continued(stop, SkipWindows(ahead))
    assert from_start == at_stop


class Stored(NamedTuple):
    """What of a checkpoint matters here."""

    skip: SkipWindows
    data_step: int
    before: Interventions
    seen: dict[int, int]  # data steps by step, that its weights come from


class Run:
    """A run that is started, stopped, killed and sent back, but for the training: which data does it see?"""

    def __init__(self, every: int) -> None:
        self.every, self.ids = every, 0
        self.configured: list[tuple[int, int]] = []
        self.done = Interventions()
        self.stored: dict[int, Stored] = {}
        self.farthest = 0  # data step that was ever seen
        self.start()

    def start(self) -> None:
        """As `Trainer.resume` does."""
        usable = [step for step, entry in self.stored.items() if self.done.holds(step, entry.before.items)]
        self.step = max(usable, default=0)
        entry = self.stored[self.step] if self.step else Stored(SkipWindows(), 0, Interventions(), {})
        ahead = SkipWindows([*self.configured, *self.done.skip.windows])
        self.skip, self.seen = entry.skip.continued(entry.data_step, ahead), dict(entry.seen)

    def train(self, steps: int, killed: bool) -> None:
        """On from where it stands; a run that is stopped writes a checkpoint, one that is killed does not."""
        for _ in range(steps):
            self.step += 1
            self.seen[self.step] = self.skip.data_step(self.step)
            self.farthest = max(self.farthest, self.seen[self.step])
            if self.step % self.every == 0:
                self.save()
        if not killed:
            self.save()
        self.start()

    def save(self) -> None:
        if self.step:
            self.stored[self.step] = Stored(self.skip, self.skip.data_step(self.step), self.done, dict(self.seen))
            top = max(step for step, entry in self.stored.items() if self.done.holds(step, entry.before.items))
            for step, entry in list(self.stored.items()):  # as rotation does
                if step < top and not self.done.holds(step, entry.before.items):
                    del self.stored[step]

    def repair(self, window: tuple[int, int]) -> bool:
        """By recovery or the tool: go back to a checkpoint from before the window."""
        usable = [step for step, entry in self.stored.items() if self.done.holds(step, entry.before.items)]
        before = [step for step in usable if self.stored[step].data_step < window[0]]
        if before:
            self.ids += 1
            self.done = self.done.add(made(str(self.ids), max(before), window))
            self.start()
        return bool(before)

    def undo(self) -> None:
        self.done = self.done.undone()
        self.start()


lengths = st.integers(0, 6)
turns = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 15), st.just(0)),
    st.tuples(st.just("kill"), st.integers(1, 15), st.just(0)),
    st.tuples(st.just("configure"), st.integers(1, 20), lengths),
    st.tuples(st.just("repair"), st.integers(1, 60), lengths),
    st.tuples(st.just("regret"), st.integers(1, 60), lengths),
    st.tuples(st.just("undo"), st.just(0), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.lists(turns, min_size=1, max_size=12))
def test_the_order_is_that_of_knowing_all_windows_from_the_start(every: int, turns: list) -> None:
    """Random windows, by the configuration at stops and by repairs that go back, some undone; random stops, kills."""
    run = Run(every)
    for kind, at, long in turns:
        if kind in ("train", "kill"):
            run.train(at, killed=kind == "kill")
        elif kind == "configure":  # the user sets what lies ahead of all that was trained on
            run.configured.append((run.farthest + at, run.farthest + at + long))
            run.start()
        elif kind == "repair":
            run.repair((at, at + long))
        elif kind == "regret":
            if run.repair((at, at + long)):
                run.train(at + 5, killed=False)
                run.undo()
        elif run.done.items:
            run.undo()
    run.train(10, killed=False)
    from_start = SkipWindows([*run.configured, *run.done.skip.windows])
    wanted = {step: from_start.data_step(step) for step in range(1, run.step + 1)}
    assert run.seen == wanted
    assert len(set(run.seen.values())) == run.step, "no sample twice, none left out but those"
    assert (run.stored[run.step].data_step, run.stored[run.step].skip) == (wanted[run.step], from_start)
