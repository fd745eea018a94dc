"""What is said to have been in a batch was in it, and weighs what it is said to weigh."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_stable.analysis.inspection import _excerpt, inspect, scores, visible
from megatron_stable.analysis.position import find_step
from megatron_stable.checkpoint.model import load_model
from megatron_stable.config.load import dump_config
from megatron_stable.config.schema import Config, ParallelConfig
from megatron_stable.data import Course, IndexedWriter, open_dataset
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import Resume
from tests.harness.ranks import Ranks
from tests.training.runs import SEQUENCE, VOCAB, settings, train

SEED, BATCH = 3, 8


def write_documents(prefix: Path, lengths: list[int], low: int, high: int) -> list[np.ndarray]:
    """A dataset of documents of random tokens in [low, high)."""
    random = np.random.default_rng(len(lengths))
    documents = [random.integers(low, high, length) for length in lengths]
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add(document)
    return documents


def write_run(folder: Path, *lines: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """A run's directory without checkpoints: configuration and metrics."""
    config = Config.model_validate(settings(folder, **sections))
    run = Path(config.run.directory)
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def line(step: int, data_step: int | None = None, **facts: Any) -> dict[str, Any]:
    place = step if data_step is None else data_step
    return {"step": step, "data_step": place, "samples": [[(place - 1) * BATCH, place * BATCH]], **facts}


def test_documents_are_those_whose_tokens_are_predicted(tmp_path: Path) -> None:
    texts = {
        str(tmp_path / "a"): write_documents(tmp_path / "a", [5, 1, 40, 3, 3, 100, 16, 90], 0, VOCAB),
        str(tmp_path / "b"): write_documents(tmp_path / "b", [200, 2, 2, 2, 60], 0, VOCAB),
    }
    blend = dict(zip(texts, (0.6, 0.4), strict=True))
    run = write_run(tmp_path, line(1), data={"train": blend})
    dataset = open_dataset(blend, SEQUENCE, SEED)
    seen = set()
    for step in (1, 2, 3, 4, 7):
        found = inspect(run, data_step=step)
        expected = [dataset.sample(k) for k in range((step - 1) * BATCH, step * BATCH)]
        assert [sample.number for sample in found.samples] == list(range((step - 1) * BATCH, step * BATCH))
        for sample, tokens in zip(found.samples, expected, strict=True):
            parts = [texts[d.dataset][d.number][d.first : d.first + d.tokens] for d in sample.documents]
            assert np.array_equal(np.concatenate(parts), tokens[1:])
            assert all(
                document.length == len(texts[document.dataset][document.number]) for document in sample.documents
            )
            assert sample.documents[0].excerpt.startswith(f"token ids {tokens[1]}"), "there is no tokenizer"
            seen |= {(document.dataset, len(sample.documents) > 1) for document in sample.documents}
        assert found.opinion is None and found.checkpoints == ()
    assert len(seen) == 4, "both datasets, with one document and with several"


def test_steps_are_found_by_what_the_run_recorded(tmp_path: Path) -> None:
    lines = [line(1), line(2), line(3), line(4), line(3, 7), line(4, 8, loss=2.5)]
    run = write_run(tmp_path, *lines)
    assert find_step(run, 2) == (2, 2, ((8, 16),), lines[1], (), (2, 2))
    step, data_step, samples, record, notes, _ = find_step(run, 4)
    assert (step, data_step, samples, record) == (4, 8, ((56, 64),), lines[-1])
    assert notes == ("before a rollback, step 4 was data step 4: see --data-step 4",)
    assert find_step(run, data_step=4)[:4] == (4, 4, ((24, 32),), lines[3])
    assert find_step(run, data_step=8)[:4] == (4, 8, ((56, 64),), lines[-1])
    ahead = find_step(run, data_step=40)
    assert ahead[:4] == (None, 40, ((312, 320),), None) and "not come to data step 40 yet" in ahead.notes[0]
    for wrong in ({"step": 5}, {"step": 0}, {"data_step": 0}, {}, {"step": 1, "data_step": 1}):
        with pytest.raises(ConfigError):
            find_step(run, **wrong)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="recorded no step yet"):
        find_step(run, 1)


def test_the_batch_is_that_of_then(tmp_path: Path) -> None:
    """Whatever batch size and seed the run has today."""
    write_documents(tmp_path / "data", [500], 0, VOCAB)
    batches = [[[0, 2]], [[2, 4]], [[4, 6]], [[6, 8]], [[8, 10], [20, 22]], [[22, 26]], [[26, 34]], [[34, 42]]]
    lines = [line(step) | {"samples": pieces} for step, pieces in enumerate(batches, 1)]
    run = write_run(tmp_path, *lines, batch={"global_size": 8, "micro_size": 1})
    ledger = RunDirectory(run).ledger
    seen: dict[str, Any] = {"ranks": 1, "layout": ParallelConfig()}
    ledger.write(Resume(step=4, **seen, changed={"batch.global_size": (2, 4), "run.seed": (9, SEED)}))
    ledger.write(Resume(step=6, **seen, changed={"batch.global_size": (4, 8), "optimizer.learning_rate": (1, 2)}))
    for step, seed in ((3, 9), (4, 9), (5, SEED), (6, SEED), (7, SEED)):
        found = inspect(run, step)
        dataset = open_dataset(str(tmp_path / "data"), SEQUENCE, seed)
        numbers = [k for first, end in batches[step - 1] for k in range(first, end)]
        assert [s.number for s in found.samples] == numbers
        assert [s.start for s in found.samples] == [dataset.locate(k).start for k in numbers]
        notes = (f"run.seed was 9 at step {step}, and {SEED} from step 5 on",)
        assert found.position.notes == (notes if seed == 9 else ())


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, line(1))
    with pytest.raises(DataError, match=r"data\.idx does not exist.*put the dataset.*where the run had it"):
        inspect(run, 1)
    write_documents(tmp_path / "data", [500], 0, VOCAB)
    with pytest.raises(DataError, match=r"has no checkpoints/|no checkpoint of step 5"):
        inspect(run, 1, checkpoints=[5])
    with pytest.raises(DataError, match="give --tokenizer FILE"):
        inspect(run, 1, tokenizer=tmp_path / "none.model")
    with pytest.raises(DataError, match="no run in"):
        inspect(tmp_path, 1)


def test_text_is_safe_on_a_terminal() -> None:
    assert visible("a\tb\nc\x1b[31m\u202e\u200b\x9b\ud800 é😀\\") == r"a\tb\nc\x1b[31m\u202e\u200b\x9b\ud800 é😀\\"
    assert visible("plain text, [red]") == "plain text, [red]"


def test_an_excerpt_shows_the_worst_stretch() -> None:
    tokens, losses = np.arange(200), np.where(np.arange(200) // 32 == 3, 5.0, 1.0)  # tokens 96 to 127
    assert _excerpt(tokens, losses, None, 20) == "…token ids 88 89 90 9…"
    assert _excerpt(tokens, None, None, 20) == "token ids 0 1 2 3 4 …"
    losses[10] = np.nan
    assert _excerpt(tokens, losses, None, 20) == "token ids 0 1 2 3 4 …"


def test_scores_are_robust_deviations_above_the_median() -> None:
    losses = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0, np.nan])
    assert scores(losses)[:8] == pytest.approx((losses[:8] - 4.5) / (1.4826 * 2.0))
    assert scores(losses)[8] == np.inf
    assert not scores(losses[:7]).any(), "too few to tell"
    assert scores(np.append(np.full(9, 2.0), 2.05))[-1] == pytest.approx(2.5), "samples that are alike: 1% of them"


@pytest.fixture(scope="module")
def poisoned(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps on tokens below 12, with one document of others in some batch."""
    folder = tmp_path_factory.mktemp("poisoned")
    random = np.random.default_rng(0)
    with IndexedWriter(folder / "data", np.uint16) as writer:
        for number in range(40):
            writer.add(random.integers(40, VOCAB, 64) if number == 33 else random.integers(0, 12, 200))
    values = settings(folder, steps=30, batch={"global_size": 16, "micro_size": 4}, checkpoint={"every": 15, "keep": 9},
                      optimizer={"eps": 1e-8, "learning_rate": 1e-2})  # fmt: skip
    assert ranks.run(2, train, values) == [0, 0]
    return folder / "run"


def worst_data_step(run: Path) -> int:
    """The data step with the largest share of the strange document."""
    dataset = open_dataset(str(run.parent / "data"), SEQUENCE, SEED)
    shares = [int((np.stack([dataset.sample(k) for k in range(s * 16, s * 16 + 16)]) >= 40).sum()) for s in range(60)]
    return int(np.argmax(shares)) + 1


@torch.no_grad()
def by_hand(run: Path, checkpoint: int, data_step: int) -> np.ndarray:
    """Cross-entropy of each token of a batch, ``[n, s]``, from the model's logits."""
    dataset = open_dataset(str(run.parent / "data"), SEQUENCE, SEED)
    tokens = torch.from_numpy(np.stack([dataset.sample(k) for k in range((data_step - 1) * 16, data_step * 16)]))
    logits = load_model(run, checkpoint)[1](tokens[:, :-1])[..., :VOCAB].double()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").numpy()


def test_losses_are_those_of_each_checkpoint_and_the_strange_document_stands_out(poisoned: Path) -> None:
    data_step, seen = worst_data_step(poisoned), []
    found = inspect(poisoned, data_step=data_step, checkpoints=[30, 15], progress=lambda *n: seen.append(n))
    assert seen[0] == (30, 0, 16) and seen[-1] == (15, 16, 16)
    losses = [by_hand(poisoned, checkpoint, data_step) for checkpoint in (30, 15)]
    for i, sample in enumerate(found.samples):
        assert sample.losses == pytest.approx([nll[i].mean() for nll in losses], rel=1e-4)
        at = 0
        for document in sample.documents:
            own = losses[0][i, at : at + document.tokens]
            assert document.losses[0] == pytest.approx(own.mean(), rel=1e-4)
            assert document.raises == pytest.approx(
                (own - np.median(losses[0].mean(1))).sum() / losses[0].size, abs=1e-5
            )
            at += document.tokens
    assert found.worst_documents[0][1].number == 33
    assert found.by_loss[0] is found.worst_documents[0][0]
    assert all(sample.scores[0] < 6 for sample in found.samples if all(d.number != 33 for d in sample.documents))


def test_without_a_record_the_skip_windows_of_the_newest_checkpoint_tell(poisoned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(poisoned, run)
    (run / "metrics.jsonl").unlink()
    assert find_step(run, 20)[:2] == (20, 20)
    manifest = run / "checkpoints" / "step_00000030" / "manifest.json"
    _with_windows(manifest, [(3, 5)])
    assert find_step(run, 20)[:2] == (20, 23)
    assert "skip windows" in find_step(run, 20).notes[0]
    assert find_step(run, data_step=23)[:2] == (20, 23)
    assert find_step(run, data_step=34).step is None, "not trained yet"
    skipped = find_step(run, data_step=4)
    assert skipped.step is None and "in a skip window" in skipped.notes[0]


def _with_windows(path: Path, windows: list[tuple[int, int]]) -> None:
    from megatron_stable.checkpoint.format import read_manifest

    manifest = read_manifest(path.parent)
    state = manifest.state.model_copy(update={"course": Course.begin(16, windows)})
    path.write_text(manifest.model_copy(update={"state": state}).dumps())
