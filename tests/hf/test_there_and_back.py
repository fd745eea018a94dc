"""A model's way between this trainer and the tools of others: trained, scored, tuned, brought back and trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.config.load import load_config
from megatron_stable.convert.huggingface.export import export
from megatron_stable.convert.huggingface.importing import take
from megatron_stable.data.indexed import IndexedDataset
from megatron_stable.data.tokenizer import Tokenizer
from tests.commands.conftest import SmallDemo, small
from tests.convert.models import our_logits
from tests.harness.ranks import Ranks
from tests.training.runs import Values, metrics, train

__all__ = ["small"]
transformers = pytest.importorskip("transformers")
import megatron_stable.hf  # noqa: E402, F401  (registers our class)

LENGTH = 64


def convert(*arguments: str | Path) -> None:
    """The verb itself, which takes the tokenizer along; another process knows nothing of this one's registrations."""
    subprocess.run([sys.executable, "-m", "megatron_stable", "convert", *arguments], check=True, timeout=120)


class Trained(NamedTuple):
    """A run of `qkv_norm` on TP 2 x PP 2, and its model as `transformers` has it."""

    run: Path
    model: Path
    values: Values


def settings_of(small: SmallDemo, run: Path, **sections: dict[str, Any]) -> Values:
    """The demo's data and tokenizer, at a rate at which the loss falls smoothly."""
    values: Values = load_config(small.directory / "config.yaml").model_dump(mode="json")
    given = {
        "run": {"directory": str(run), "steps": 60},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "constant", "warmup_steps": 5},
        "evaluation": {"every": 100, "batches": 1},
    }
    for section, fields in [*given.items(), *sections.items()]:
        values[section] = {**values[section], **fields}
    return values


@pytest.fixture(scope="module")
def trained(small: SmallDemo, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Trained:
    folder = tmp_path_factory.mktemp("there_and_back")
    shape = {"recipe": "qkv_norm", "layers": 2, "hidden": 64, "sequence_length": LENGTH, "vocab_size": None}
    values = settings_of(small, folder / "run", model=shape, parallel={"tensor": 2, "pipeline": 2})
    assert ranks.run(4, train, values, timeout=200) == [0] * 4
    convert(folder / "run", "--to", "hf", "--output", folder / "model")
    return Trained(folder / "run", folder / "model", values)


def windows(trained: Trained, which: str, count: int) -> Tensor:
    """Token ids ``[count, LENGTH]`` of the run's data."""
    tokens = IndexedDataset(trained.values["data"][which]).read(0, count * LENGTH)
    return torch.from_numpy(tokens.astype(np.int64)).view(count, LENGTH)


def loss_of(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def comes_back_and_trains_on(tuned: Path, trained: Trained, ranks: Ranks) -> None:
    """What was tuned elsewhere computes the same here, and its loss goes on from where it was."""
    ids = windows(trained, "validation", 32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned).eval()
    run = tuned.with_name(f"{tuned.name}_back")
    convert(tuned, "--from", "hf", "--output", run)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(our_logits(run, ids), logits, rtol=0, atol=1e-4)
    values: Values = load_config(run / "config.yaml").model_dump(mode="json")
    for section in ("batch", "optimizer", "schedule", "evaluation", "data"):  # data names the tokenizer that made it
        values[section] = trained.values[section]
    values["run"]["steps"] = 20
    values["parallel"]["tensor"] = 2
    assert ranks.run(2, train, values, timeout=200) == [0] * 2
    losses = [record["loss"] for record in metrics(run).values()]
    assert losses[0] == pytest.approx(loss_of(logits, ids), abs=0.4)  # of other text
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_tuned_by_transformers(trained: Trained, ranks: Ranks, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.model)
    ids = windows(trained, "train", 160)
    before = loss_of(model(ids).logits, ids)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "tuned"), max_steps=20, per_device_train_batch_size=8, learning_rate=1e-3,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    together = transformers.default_data_collator  # which does not pad
    trainer = transformers.Trainer(model, arguments, together, rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    assert loss_of(model(ids).logits, ids) < before - 0.05
    comes_back_and_trains_on(tmp_path / "tuned", trained, ranks)


@pytest.mark.full
def test_tuned_by_trl(trained: Trained, ranks: Ranks, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.model)
    ids = windows(trained, "train", 160)
    before = loss_of(model(ids).logits, ids)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "tuned"), max_steps=20, per_device_train_batch_size=8, learning_rate=1e-3,
        max_length=LENGTH, bf16=False, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    texts = datasets.Dataset.from_dict({"text": tokenizer.batch_decode(ids)})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    assert loss_of(model(ids).logits, ids) < before - 0.05
    comes_back_and_trains_on(tmp_path / "tuned", trained, ranks)


@pytest.mark.full
def test_scored_by_lm_evaluation_harness(trained: Trained, tmp_path: Path) -> None:
    """A local task by its command: log-likelihoods decide as ours do, and bits per byte are ours."""
    pytest.importorskip("lm_eval")
    tokenizer = Tokenizer(trained.values["data"]["tokenizer"])
    ids = windows(trained, "validation", 24)
    rows, right = [], 0
    with torch.no_grad():
        for row in ids.tolist():
            context, choices = row[:20], [row[20:40], row[39:19:-1]]
            texts = [tokenizer.decode(tokens) for tokens in (context, *choices)]
            likelihoods = []
            for text in texts[1:]:
                whole = tokenizer.encode(texts[0] + text)
                start = len(tokenizer.encode(texts[0]))
                logits = our_logits(trained.run, torch.tensor([whole[:-1]])).log_softmax(-1)[0]
                likelihoods.append(sum(logits[i - 1, whole[i]].item() for i in range(start, len(whole))))
            right += likelihoods[0] > likelihoods[1]
            rows.append({"context": texts[0], "choices": texts[1:], "label": 0})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(f"""
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path}/rows.jsonl}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    harness = "-m megatron_stable.hf lm_eval --model hf --tasks local --device cpu --batch_size 8 --model_args"
    ended = subprocess.run(
        [
            sys.executable, *harness.split(), f"pretrained={trained.model}",
            "--include_path", tmp_path, "--output_path", tmp_path / "scores",
        ],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (scores,) = (tmp_path / "scores").rglob("results*.json")
    assert json.loads(scores.read_text())["results"]["local"]["acc,none"] == pytest.approx(right / len(rows))
    assert right > len(rows) / 2


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_an_architecture_of_theirs_trains_here_and_goes_out(
    family: str, trained: Trained, ranks: Ranks, tmp_path: Path
) -> None:
    kind = getattr(transformers, family)
    shape = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "num_attention_heads": 4, "max_position_embeddings": LENGTH, "head_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    kind(kind.config_class(**shape)).save_pretrained(tmp_path / "theirs")
    take(tmp_path / "theirs", tmp_path / "run")
    values: Values = load_config(tmp_path / "run" / "config.yaml").model_dump(mode="json")
    for section in ("batch", "optimizer", "schedule", "evaluation", "data"):
        values[section] = trained.values[section]
    values["run"]["steps"] = 50
    values["parallel"]["tensor"] = 2
    assert ranks.run(2, train, values, timeout=200) == [0] * 2
    losses = [record["loss"] for record in metrics(tmp_path / "run").values()]
    assert np.mean(losses[-5:]) < losses[0] - 1
    assert export(newest_whole(tmp_path / "run"), tmp_path / "out", "fp32").architecture == family
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = windows(trained, "validation", 4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, our_logits(tmp_path / "run", ids), rtol=0, atol=1e-5)
