"""What is generated from the schema: the reference page and the commented file."""

from pathlib import Path

import pytest
import yaml

from megatron_stable.config.describe import entries, sections
from megatron_stable.config.load import load_config
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.reference import commented_yaml, reference_page
from megatron_stable.config.schema import Config
from megatron_stable.config.sizes import SIZES

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run `make docs`"


def test_every_field_and_section_is_documented():
    for entry in entries():
        assert entry.doc.endswith("."), f"{entry.key} has no documentation, or it is not a sentence"
        assert f"| `{entry.key}` | {entry.allowed} |" in reference_page()
    assert all(sections().values())
    assert len(list(entries())) == sum(len(section) for section in Config().model_dump().values())


def test_page_names_every_size_and_recipe():
    for name in (*SIZES, *RECIPES):
        assert f"| `{name}` |" in reference_page()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.size=830m", "model.recipe=qk_norm_cap", "model.vocab_size=null"],
        ["model.size=null", "model.layers=7", "model.recipe=qk_norm", "model.qk_norm=false"],
        ["data.train={a: 1, 'b: c': 0.5}", "run.directory=no", "optimizer.betas=[0.8, 0.99]", "optimizer.eps=1e-12"],
        ["model.activation_checkpointing=2", "data.tokenizer='# not a comment'", "run.directory=3e4"],
        ["data.train={'3e4': 1, 'no': 2}", "data.validation='line\u2028break'", "run.directory=''"],
    ],
)
def test_commented_file_loads_back_the_same(tmp_path, overrides):
    config = load_config(None, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(commented_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_commented_file_shows_every_key():
    lines = [line.strip("# ").split(":")[0] for line in commented_yaml(Config()).splitlines()]
    for entry in entries():
        assert entry.name in lines


def test_changing_size_or_recipe_in_a_commented_file_changes_the_model(tmp_path):
    text = commented_yaml(load_config(None, ["model.size=10m", "model.recipe=baseline"]))
    assert "  # layers: 3\n" in text and "  # qk_norm: false\n" in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("size: 10m", "size: 85m").replace("recipe: baseline", "recipe: qk_norm_cap"))
    assert load_config(path).model == Config(model={"size": "85m", "recipe": "qk_norm_cap"}).model


def test_what_differs_from_the_size_is_not_commented_out():
    text = commented_yaml(load_config(None, ["model.size=10m", "model.layers=4"]))
    assert yaml.safe_load(text)["model"]["layers"] == 4
