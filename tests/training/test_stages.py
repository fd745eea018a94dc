"""Blends that change on real runs: by plan, on a resume, across a rollback; each source is read once, in its order."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.inspection import inspect
from megatron_stable.analysis.status import status_of
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.format import stored_config
from megatron_stable.config.load import load_config
from megatron_stable.convert.huggingface.card import facts
from megatron_stable.data import Course, TokenDataset
from megatron_stable.errors import DataError
from megatron_stable.records.ledger import Ledger
from megatron_stable.records.stages import read_stages
from megatron_stable.stability.events import Blend, Resume
from megatron_stable.surgery.operating import samples
from tests.harness.ranks import Ranks
from tests.training.runs import SEQUENCE, Values, metrics, train, write_data
from tests.training.test_batch_size import Legs, numbers

TOKENS = {"web": 1601, "code": 801, "math": 1201}


class Staged(Legs):
    """A run on sources of a YAML file, which is written anew before each start."""

    def __init__(self, ranks: Ranks, folder: Path, **sections: Any) -> None:
        super().__init__(ranks, folder, data={"train": str(folder / "data.yaml")}, **sections)
        for seed, (name, tokens) in enumerate(TOKENS.items()):
            write_data(folder / name, tokens, seed=seed)
        self.folder = folder

    def sources(self, **weights: float | None) -> None:
        listed = {name: {"path": name, **({"weight": weight} if weight else {})} for name, weight in weights.items()}
        (self.folder / "data.yaml").write_text(json.dumps({"sources": listed}))

    def stage(self, *stages: tuple[int, dict[str, float]]) -> None:
        self.values["data"] = {**self.values["data"], "stages": [[sample, blend] for sample, blend in stages]}

    @property
    def events(self) -> list[Any]:
        return Ledger(self.run / "ledger.jsonl").read()

    def read(self) -> dict[str, list[int]]:
        """The own samples of each source that the run as it stands has trained on, in order, by the run's order."""
        order, found = read_stages(self.run), defaultdict(list)
        assert order is not None
        for batch in self.batches():
            for name, own in map(order.locate, batch):
                found[name].append(own)
        return found


def test_stages_and_sources_that_come_and_go(ranks: Ranks, tmp_path: Path) -> None:
    legs = Staged(ranks, tmp_path)
    legs.sources(web=None, code=None)
    legs.stage((0, {"web": 3, "code": 1}), (20, {"web": 1, "code": 1}))
    assert legs.go(4, size=8, micro=4, world=1) == numbers((0, 32))  # web 15 + 6, code 5 + 6
    (entered,) = (event for event in legs.events if isinstance(event, Blend))
    assert (entered.step, entered.sample, entered.read) == (3, 20, {"web": 15, "code": 5})
    assert entered.shares == {"web": 0.5, "code": 0.5} and not entered.added

    legs.sources(web=None, math=None)  # code is gone, which the stage that is over may go on to name
    legs.stage((0, {"web": 3, "code": 1}), (32, {"math": 1, "web": 1}), (40, {"math": 1}))
    assert legs.go(5, size=12, micro=3, world=2) == numbers((32, 44))
    told = [(event.step, event.removed) for event in legs.events if isinstance(event, Blend)]
    assert told == [(3, ()), (5, ("code",)), (5, ("web",))], "both that begin in a batch"
    order, config = read_stages(legs.run), load_config(legs.run / "config.yaml")
    assert order is not None
    looked_at = samples(config, config, Course.begin(8), order, 4, number=12)  # of what came next then: no code
    sources = {name: TokenDataset(tmp_path / name, SEQUENCE, 3) for name in TOKENS}
    own = [order.locate(k) for k in range(32, 44)]
    assert looked_at.tolist() == [sources[name].sample(k).tolist() for name, k in own]

    legs.sources(code=1, web=1)  # and comes back: from its 11th sample on
    legs.stage()
    assert legs.go(7, size=4, micro=4, world=1) == numbers((44, 52))
    assert legs.read() == {"web": list(range(29)), "code": list(range(15)), "math": list(range(8))}
    back = [event for event in legs.events if isinstance(event, Blend)][-1]
    assert back.added == ("code", "web") and back.removed == ("math",)
    assert "50 % code (from its sample 11 on)" in back.sentence() and "no more of math" in back.sentence()

    record = metrics(legs.run)[7]
    epochs = {key.removeprefix("epochs/"): value for key, value in record.items() if key.startswith("epochs/")}
    windows = {name: (tokens - 1) // SEQUENCE for name, tokens in TOKENS.items()}
    assert epochs == {"web": 29 / windows["web"], "code": 15 / windows["code"], "math": 8 / windows["math"]}
    assert status_of(legs.run).epochs == epochs
    state = store.entries(legs.run / "checkpoints")[-1].manifest.state  # type: ignore[union-attr]
    assert state.stages == read_stages(legs.run)

    order = read_stages(legs.run)
    assert order is not None
    for step in (2, 5, 7):
        for sample in inspect(legs.run, step).samples:
            name, number = order.locate(sample.number)
            assert {part.dataset for part in sample.documents} == {name}
            assert sample.start == sources[name].locate(number).start

    legs.go(8, size=4, micro=4, world=1)
    state = store.entries(legs.run / "checkpoints")[-1].manifest.state  # type: ignore[union-attr]
    assert [batch.step for batch in state.guard.memory] == [6, 7, 8], "all of sources that are there"


def test_an_edit_of_the_file_is_noticed(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    legs = Staged(ranks, tmp_path)
    legs.sources(web=1, code=1)
    legs.go(2, size=8, micro=8, world=1)
    legs.sources(web=7, code=7)
    legs.go(3, size=8, micro=8, world=1)
    resumed = [event for event in legs.events if isinstance(event, Resume)]
    assert resumed[-1].changed == {"run.steps": (2, 3)} and not [e for e in legs.events if isinstance(e, Blend)]
    capsys.readouterr()
    legs.sources(web=1, code=3)
    legs.go(4, size=8, micro=8, world=1)
    said = capsys.readouterr().out
    assert "the blend of the data has changed; from sample 24 on it is 75 % code, 25 % web" in said
    assert "is not reached" not in said
    changed = [event for event in legs.events if isinstance(event, Resume)][-1].changed
    assert changed["data.train"] == ([[0, {"web": 7.0, "code": 7.0}]], [[0, {"web": 1.0, "code": 3.0}]])
    assert [event.sample for event in legs.events if isinstance(event, Blend)] == [24]
    legs.sources(web=None, code=None)
    legs.stage((0, {"web": 1, "code": 3}), (40, {"web": 1}))
    legs.go(5, size=8, micro=8, world=1)
    assert legs.read() == {"web": list(range(16)), "code": list(range(24))}
    said = capsys.readouterr().out
    assert "warning: data.stages: the blend from sample 40 on is not reached, as step 5, the last, ends before" in said
    whole = newest_whole(legs.run)
    card = dict(facts(whole, stored_config(whole.directory, whole.manifest)))
    assert card["data"] == "`web` 50.0%, `code` 50.0%; from sequence 24 on `web` 25.0%, `code` 75.0%"


def test_back_across_an_edit(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The edit stays where it was made, so that what is skipped is what was meant; a removed source is read again."""
    legs = Staged(ranks, tmp_path)
    legs.sources(web=1, code=1)
    legs.go(2, size=8, micro=8, world=1)
    legs.go(5, size=8, micro=8, world=1)
    legs.sources(web=1, math=1)
    legs.go(8, size=8, micro=8, world=1)
    before = read_stages(legs.run)
    assert before is not None and [stage.sample for stage in before.stages] == [0, 40]
    assert legs.skip(4, 6) == 2, "samples 24 to 47, on both sides of it"
    (tmp_path / "code.idx").rename(tmp_path / "gone.idx")
    assert ranks.run(1, train, legs.values) == [5]
    said = capsys.readouterr().out
    assert "code.idx does not exist; from sample 16 on this run still reads code, which data.train names no " in said
    (tmp_path / "gone.idx").rename(tmp_path / "code.idx")
    assert legs.go(5, size=8, micro=8, world=1) == numbers((16, 24), (48, 64))
    assert read_stages(legs.run) == before
    legs.sources(web=1)
    legs.go(8, size=8, micro=8, world=1)
    assert legs.read() == {
        "web": numbers((0, 12), (24, 56)),
        "code": numbers((0, 12)),
        "math": numbers((4, 12)),
    }


def test_a_step_that_was_given_up_is_seen_with_the_blend_that_it_had(ranks: Ranks, tmp_path: Path) -> None:
    """A source is suspected of a spike, and taken out on the way back before it."""
    legs = Staged(ranks, tmp_path)
    legs.sources(web=1, code=1)
    legs.go(2, size=8, micro=8, world=1)
    legs.go(5, size=8, micro=8, world=1)
    shutil.rmtree(legs.run / "checkpoints" / "step_00000005")
    legs.sources(web=1, math=1)
    legs.go(3, size=8, micro=8, world=1)
    seen = {step: {part.dataset for s in inspect(legs.run, step).samples for part in s.documents} for step in (2, 3, 4)}
    assert seen == {2: {"web", "code"}, 3: {"web", "math"}, 4: {"web", "code"}}


def test_sources_that_cannot_go_on(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    legs = Staged(ranks, tmp_path)
    legs.sources(web=None, code=None)
    legs.stage((0, {"web": 1, "code": 1}))
    legs.go(1, size=8, micro=8, world=1)
    index = (tmp_path / "code.idx").read_bytes()
    on = {**legs.values, "run": {**legs.values["run"], "steps": 2}}

    def refused(code: int, message: str) -> None:
        assert ranks.run(1, train, on) == [code]
        assert message in capsys.readouterr().out

    legs.sources(web=1)
    refused(2, "sample 8 on there is a part of 'code', which data.train does not name any more; it names web")
    legs.sources(web=1, code=1)
    (tmp_path / "code.idx").unlink()
    refused(5, "code")
    (tmp_path / "code.idx").write_bytes(index)
    legs.go(1, size=8, micro=8, world=1)
    write_data(tmp_path / "code", 900)
    changed = "source code holds 900 tokens in 1 documents, and held 801 in 1 when this run began to read it"
    refused(5, changed)
    with pytest.raises(DataError, match=changed):  # other documents than those that were there
        inspect(legs.run, 1)
    (legs.run / "stages.json").write_text('{"streams": {}}')
    refused(5, "stages.json: stages: Field required; restore it from a backup")


def train_as_before(values: Values) -> int:
    """On a rank: as a version did that noted no stages."""
    from megatron_stable.training import trainer

    state = trainer.RunState
    trainer.RunState = lambda **fields: state(**{**fields, "stages": None})  # type: ignore[assignment, misc]
    return train(values)


def test_a_run_of_an_older_version_goes_on(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    legs = Staged(ranks, tmp_path)
    web, code, math = (str(tmp_path / name) for name in TOKENS)
    legs.values["data"] = {"train": {web: 3, code: 1}}
    first = {**legs.values, "run": {**legs.values["run"], "steps": 2}}
    assert ranks.run(1, train_as_before, first) == [0]
    (legs.run / "stages.json").unlink()
    state = store.entries(legs.run / "checkpoints")[-1].manifest.state  # type: ignore[union-attr]
    assert state.stages is None
    legs.values["data"] = {"train": {web: 1, math: 1}}
    legs.go(3, size=8, micro=8, world=1)
    assert legs.read() == {web: list(range(16)), code: list(range(4)), math: list(range(4))}
    legs.values["data"] = {"train": [web, math]}
    capsys.readouterr()
    legs.go(4, size=8, micro=8, world=1)
    assert f"warning: source {web} and 1 more begins anew, and holds what {math} held" in capsys.readouterr().out
