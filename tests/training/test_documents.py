"""A run that keeps documents apart and leaves samples out: what it says, records and evaluates, and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_stable.analysis.evaluation import evaluate, open_data
from megatron_stable.analysis.inspection import inspect, token_losses
from megatron_stable.analysis.trained import open_run
from megatron_stable.checkpoint import store
from megatron_stable.data import IndexedDataset, IndexedWriter, preprocess, train_tokenizer
from tests.harness.ranks import Ranks
from tests.reference.documents import pieces
from tests.training.runs import SEQUENCE, VOCAB, Values, curve, metrics, settings, train

END = 1


def write_documents(prefix: Path, seed: int, repeated: bool = False) -> str:
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(400):
            tokens = rng.integers(2, VOCAB, rng.integers(2, 20))
            tokens = np.full(3 * SEQUENCE, 5) if repeated and number % 10 == 0 else tokens
            writer.add([*tokens, END])
    return str(prefix)


@pytest.fixture
def values(folder: Path) -> Values:
    data = {
        "train": write_documents(folder / "documents", 0, repeated=True),
        "validation": write_documents(folder / "held-out", 1),
        "document_mask": True,
        "end_of_document": END,
        "repetition_filter": 8,
    }
    return settings(folder, steps=6, data=data, evaluation={"every": 6, "batches": 2})


def test_a_run_from_start_to_evaluation(ranks: Ranks, folder: Path, values: Values, capsys: Any) -> None:
    values["parallel"] = {"pipeline": 2}
    values["logging"]["tensorboard"] = True
    assert ranks.run(2, train, values) == [0, 0]
    records = metrics(folder / "run")
    # some samples have at least 8 of 5 in a row, counted from the data
    stream = IndexedDataset(str(folder / "documents")).read(0, IndexedDataset(str(folder / "documents")).tokens)
    windows = [stream[at : at + SEQUENCE + 1].tolist() for at in range(0, len(stream) - SEQUENCE, SEQUENCE)]
    share = np.mean([any(window[i : i + 8] == [5] * 8 for i in range(SEQUENCE - 6)) for window in windows])
    found = np.mean([record["left_out"] for record in records.values()])
    assert 0.1 < share < 0.9 and abs(found - share) < 0.2 and all(0 <= r["left_out"] < 1 for r in records.values())
    assert {record["left_out"] * 8 % 1 for record in records.values()} == {0.0}
    found = inspect(folder / "run", step=3, checkpoints=[5])
    assert sum(sample.left_out for sample in found.samples) == 8 * records[3]["left_out"] > 0
    trained = open_run(folder / "run")
    assert trained.config.data.document_mask
    result = evaluate(trained, open_data(trained), batches=2)
    assert result.loss == pytest.approx(records[6]["validation_loss"], rel=1e-5)
    # and by hand: each document alone
    row = torch.from_numpy(IndexedDataset(str(folder / "held-out")).read(3, SEQUENCE + 1).astype(np.int64))
    alone = torch.cat([trained.model(row[None, :-1][:, part])[0] for part in pieces(row[:-1], END)])
    wanted = torch.nn.functional.cross_entropy(alone[:, :VOCAB], row[1:], reduction="none").detach()
    losses = token_losses(trained, row[None].numpy())[0]
    np.testing.assert_allclose(losses, wanted.numpy(), rtol=1e-4)
    assert not np.allclose(losses, token_losses(trained._replace(config=plain(trained.config)), row[None].numpy())[0])


def plain(config: Any) -> Any:
    return config.model_copy(update={"data": config.data.model_copy(update={"document_mask": False})})


def test_a_run_resumes_to_the_same_bits(ranks: Ranks, folder: Path, values: Values) -> None:
    values["schedule"] = {"kind": "constant", "warmup_steps": 0}
    values["checkpoint"] = {"every": 3, "keep": 9}
    assert ranks.run(1, train, values) == [0]
    whole = curve(folder / "run")
    values["run"] |= {"directory": str(folder / "parts"), "steps": 3}
    assert ranks.run(1, train, values) == [0]
    values["run"]["steps"] = 6
    assert ranks.run(1, train, values) == [0]
    assert curve(folder / "parts") == whole


def test_losses_of_another_function_are_not_compared(ranks: Ranks, folder: Path, values: Values, capsys: Any) -> None:
    """Nor is a step that had no filter seen through today's."""
    data, begun = values["data"], ("document_mask", "end_of_document", "repetition_filter")
    values["data"] = {key: value for key, value in data.items() if key not in begun}
    values["run"]["steps"] = 3
    values["guard"] = {"mode": "watch"}
    assert ranks.run(1, train, values) == [0]
    values["data"], values["run"]["steps"] = data, 6
    capsys.readouterr()
    assert ranks.run(1, train, values) == [0]
    said = "data.document_mask and data.end_of_document and data.repetition_filter changed"
    assert f"{said}, so losses are not comparable with those of before" in capsys.readouterr().out
    state = store.entries(folder / "run" / "checkpoints")[-1].manifest.state  # type: ignore[union-attr]
    assert [batch.step for batch in state.guard.memory] == [4, 5, 6]
    before, after = (inspect(folder / "run", step) for step in (2, 5))
    assert not any(sample.left_out for sample in before.samples) and any(sample.left_out for sample in after.samples)
    notes = " ".join(before.position.notes)
    assert "repetition_filter was None at step 2, and 8 from step 4 on" in notes and not after.position.notes
    assert ranks.run(1, train, {**values, "run": {**values["run"], "steps": 7}}) == [0]
    assert said not in capsys.readouterr().out


def test_the_tokenizer_says_what_is_between_documents(ranks: Ranks, folder: Path, values: Values, capsys: Any) -> None:
    lines = [json.dumps({"text": f"the loss of the norm {i}\n" * (1 + i % 3)}) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    train_tokenizer([folder / "text.jsonl"], 300, folder / "tok.model")
    preprocess([folder / "text.jsonl"], folder / "tok.model", folder / "made")
    data = {"train": str(folder / "made"), "tokenizer": str(folder / "tok.model"), "document_mask": True}
    values |= {"data": data, "model": {**values["model"], "vocab_size": None}}
    assert ranks.run(1, train, values) == [0]
    assert open_run(folder / "run").config.data.end_of_document == 1
