"""Both ways, against `transformers` itself: logits, and every byte of a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.convert.huggingface.export import export
from megatron_stable.convert.huggingface.importing import take
from tests.convert.models import CLASSES, our_logits, tokens, weights_of, write_run

transformers = pytest.importorskip("transformers")
CASES = [pytest.param(family, fields, id=name) for family, cases in CLASSES.items() for name, fields in cases.items()]


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_a_class_of_transformers_computes_the_same(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "run", **fields)
    chosen = "mistral" if family == "mistral" else None  # it computes what Llama does, which is taken first
    done = export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32", chosen)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert model.config.model_type == family
    assert type(model).__name__ == done.architecture
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logits = model.eval()(tokens()).logits
    torch.testing.assert_close(logits, our_logits(tmp_path / "run", tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_a_round_trip_keeps_every_bit(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "run", **fields)
    export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32", family)
    taken = take(tmp_path / "hf", tmp_path / "back")
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert taken.parameters == sum(weight.numel() for weight in before.values())
    assert torch.equal(our_logits(tmp_path / "run", tokens()), our_logits(tmp_path / "back", tokens()))
    export(newest_whole(tmp_path / "back"), tmp_path / "again", None, family)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_what_transformers_saved_is_read(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "run", **fields)
    export(newest_whole(tmp_path / "run"), tmp_path / "hf", "fp32", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    take(tmp_path / "theirs", tmp_path / "back")
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
