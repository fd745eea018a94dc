"""An operation as a whole: what it holds in memory, what it leaves alone, what it says of the run's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_stable.analysis.trained import Trained
from megatron_stable.checkpoint.catalog import Whole
from megatron_stable.checkpoint.format import stored_config
from megatron_stable.checkpoint.model import load_model
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.config.load import replaced
from megatron_stable.config.schema import Config
from megatron_stable.data import Course, Stage, Stages, Stream
from megatron_stable.errors import ConfigError
from megatron_stable.parallel.shards import Shard
from megatron_stable.stability.interventions import Intervention
from megatron_stable.surgery import operating
from megatron_stable.surgery.continuity import Continuity
from megatron_stable.surgery.operating import samples
from megatron_stable.surgery.streaming import places, stream
from tests.surgery.runs import cut, tokens, whole_of, write_trained
from tests.training.runs import write_data


def test_what_is_written_is_read_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of more elements than a stretch: nothing larger is asked for while the checkpoint is written."""
    whole = write_trained(tmp_path / "before", layers=1, vocab_size=140_000, tied_embeddings=True)
    asked: list[int] = []
    part, write = Reader.part, operating.write_tensors

    def counting(self: Reader, kind: str, wanted: Shard) -> torch.Tensor:
        asked.append(wanted.numel)
        return part(self, kind, wanted)

    def writing(*arguments: Any) -> Any:
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "part", counting)
            return write(*arguments)

    monkeypatch.setattr(operating, "write_tensors", writing)
    cut(whole, tmp_path / "after", {"model.vocab_size": 141_000, "model.tied_embeddings": False}, tokens(1, 9))
    assert max(asked) == operating.STRETCH < 140_000 * 32


def test_a_layer_lets_go_of_its_weights_before_the_next(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before")
    config = stored_config(whole.directory, whole.manifest)
    before: list[torch.nn.Module] = []
    for _, module in stream(whole.directory, whole.manifest, config):
        assert sum(weight.numel() for each in before for weight in each.parameters()) == 0
        before.append(module)
    assert len(before) == 6


def test_what_is_not_operated_on_is_copied_bit_for_bit(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before")
    done = cut(whole, tmp_path / "after", {"model.qk_norm": True})
    old, new = whole_of(whole), whole_of(done.whole)
    assert {key for key in new if key not in old} == {
        f"blocks.{block}.attention.{norm}_norm.weight:{kind}"
        for block in (0, 1) for norm in "qk" for kind in ("weight", "exp_avg", "exp_avg_sq")
    }  # fmt: skip
    assert all(torch.equal(new[key], old[key]) for key in old)
    assert done.whole.manifest.state == whole.manifest.state
    index = Reader(done.whole.directory, done.whole.manifest).parameters
    assert index["blocks.0.attention.qkv.weight"].dim == 0, "so that convert can slice it"


def test_moments_are_those_of_the_rule(tmp_path: Path) -> None:
    """A checkpoint without moments stays without."""
    from tests.convert.models import write_run

    write_run(tmp_path / "before")
    from megatron_stable.checkpoint.catalog import newest_whole

    done = cut(newest_whole(tmp_path / "before"), tmp_path / "after", {"model.qk_norm": True})
    assert {key.partition(":")[2] for key in whole_of(done.whole)} == {"weight"}


def test_a_cap_below_the_logits_is_refused_or_raised(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before")
    with pytest.raises(ConfigError, match=r"model\.attention_cap 0\.001 is not above the largest logit measured"):
        cut(whole, tmp_path / "refused", {"model.attention_cap": 1e-3})
    done = cut(whole, tmp_path / "raised", {"model.attention_cap": 1e-3}, raise_caps=True)
    assert done.config.model.attention_cap is not None
    assert done.config.model.attention_cap > 0.1
    assert done.changes["model.attention_cap"] == (None, done.config.model.attention_cap)


@pytest.mark.parametrize(
    ("before", "after", "learnt", "verdict"),
    [
        (2.0, 2.00005, 3.0, "unchanged"),
        (2.0, 1.5, 3.0, "continuous"),
        (2.0, 2.1, 3.0, "continuous"),
        (2.0, 2.2, 3.0, "broken"),
        (2.0, None, 3.0, "broken"),
        (5.0, 5.01, -0.1, "broken"),
    ],
)
def test_verdicts(before: float, after: float | None, learnt: float, verdict: str) -> None:
    found = Continuity(tokens=9, length=3, before=before, after=after, log_z=(1, 1), layers=(), learnt=learnt)
    assert found.verdict == verdict
    assert found.words().startswith(verdict)


def test_places_of_30b_are_known_without_allocating_them() -> None:
    config = Config.model_validate({"model": {"size": "30b", "vocab_size": 128_000}})
    sizes: dict[str, int] = {}
    for name, place in places(config).items():
        layer = name.partition(".")[0] if not name.startswith("blocks.") else ".".join(name.split(".")[:2])
        sizes[layer] = sizes.get(layer, 0) + 4 * place.numel
    assert max(sizes.values()) == sizes["head"] == 128_000 * 7168 * 4
    assert sizes["blocks.0"] == pytest.approx(2.47e9, rel=0.01)


def test_documents_are_kept_apart_as_in_training(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before", attention_cap=0.5)
    plain = stored_config(whole.directory, whole.manifest)
    config = replaced(plain, {"data.document_mask": True, "data.end_of_document": 3})
    manifest = whole.manifest.model_copy(update={"config": config.model_dump(mode="json")})
    samples = tokens(8, config.model.sequence_length + 1)
    samples[:, 5] = samples[:, 11] = 3
    done = cut(Whole(whole.directory, whole.step, manifest), tmp_path / "after", {"model.qk_norm": True}, samples)
    _, model, _ = load_model(tmp_path / "before")
    assert config.model.vocab_size is not None

    def loss(config: Config) -> float:
        with torch.no_grad(), Trained(config, model, None, whole.step).reading(samples[:, :-1]):
            logits = model(samples[:, :-1])[..., : config.model.vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()

    assert done.continuity is not None
    assert done.continuity.before == pytest.approx(loss(config), rel=1e-5)
    assert done.continuity.before != pytest.approx(loss(plain), rel=1e-3)


def with_state(whole: Whole, **state: object) -> Whole:
    manifest = whole.manifest
    return Whole(
        whole.directory, whole.step, manifest.model_copy(update={"state": manifest.state.model_copy(update=state)})
    )


def test_what_the_run_did_to_itself_stays_with_it(tmp_path: Path) -> None:
    """Its operation is in the configuration; kept as an intervention, it would be made again over the new one."""
    whole = write_trained(tmp_path / "before", qk_norm=True)
    facts = {"time": "2026-01-01T00:00:00+00:00", "by": "guard", "rule": "divergence", "rollback_to": 3}
    plain = Intervention(id="a" * 12, **facts)
    own = Intervention(id="b" * 12, changes={"model.qk_norm": (False, True)}, **facts)
    done = cut(with_state(whole, interventions=(plain, own)), tmp_path / "after", {"model.v_norm": True})
    assert done.whole.manifest.state.interventions == (plain,)


def test_with_another_length_what_is_counted_in_samples_ends_or_is_refused(tmp_path: Path) -> None:
    whole = write_trained(tmp_path / "before")
    course = Course.begin(8, skip=[(2, 3)])
    config = replaced(stored_config(whole.directory, whole.manifest), {"data.skip": [[2, 3]]})
    manifest = whole.manifest.model_copy(update={"config": config.model_dump(mode="json")})
    whole = with_state(Whole(whole.directory, whole.step, manifest), course=course)
    done = cut(whole, tmp_path / "after", {"model.sequence_length": 8}, tokens(4, 9))
    assert done.config.data.skip == ()
    (era,) = done.whole.manifest.state.course.eras
    assert (era.sample, era.data_step) == (2 * course.position(7), course.behind(7)) == (2 * 9 * 8, 9)
    stages = Stages.begin({"a": Stream(paths="a"), "b": Stream(paths="b")}, [
        Stage(sample=0, weights={"a": 1.0}), Stage(sample=100, weights={"b": 1.0}),
    ])  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.stages, or a blend"):
        cut(with_state(whole, stages=stages), tmp_path / "other", {"model.sequence_length": 8}, tokens(4, 9))


def test_stages_that_are_configured_count_samples_of_the_length_that_they_were_written_for(tmp_path: Path) -> None:
    """Noted by the run or not; what the new run gives itself counts the new ones."""
    whole = write_trained(tmp_path / "before")
    blends = [[0, {"a": 1.0}], [100, {"b": 1.0}]]
    config = replaced(stored_config(whole.directory, whole.manifest), {"data.stages": blends})
    staged = Whole(
        whole.directory, whole.step, whole.manifest.model_copy(update={"config": config.model_dump(mode="json")})
    )
    assert staged.manifest.state.stages is None
    with pytest.raises(ConfigError, match=r"data\.stages, or a blend that was changed, count samples of 16 tokens"):
        cut(staged, tmp_path / "refused", {"model.sequence_length": 8}, tokens(4, 9))
    cut(staged, tmp_path / "as long", {"model.qk_norm": True}, tokens(4, 9))
    one = Stages.begin({"a": Stream(paths="a")}, [Stage(sample=0, weights={"a": 1.0})])
    values = {"model.sequence_length": 8, "data.stages": blends}
    done = cut(with_state(whole, stages=one), tmp_path / "given", values, tokens(4, 9))
    assert done.whole.manifest.state.stages == one
    assert done.config.data.stages[1] == (100, {"b": 1.0})


@pytest.mark.parametrize(
    ("old", "new", "number", "shape"),
    [(16, 16, None, (1024, 17)), (64, 32, None, (512, 33)), (1000, 1000, None, (17, 1001)), (16, 16, 3, (3, 17))]
    + [(8192, 8192, None, (4, 8193))],
)
def test_what_is_looked_at_is_bounded(
    tmp_path: Path, old: int, new: int, number: int | None, shape: tuple[int, int]
) -> None:
    """16,384 tokens, in whole sequences of the shorter length, or four."""
    data = write_data(tmp_path / "data", 20_000)
    before = Config.model_validate({"model": {"vocab_size": 61, "sequence_length": old}, "data": {"train": data}})
    after = replaced(before, {"model.sequence_length": new})
    assert samples(before, after, Course.begin(8), None, 3, None, number).shape == shape
