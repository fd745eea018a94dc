"""The pages of docs/methods: complete, in step with schema and recipes, and their examples are valid configurations."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_stable.config.load import load_config
from megatron_stable.config.methods import FACTS, facts, index_page
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config, ModelConfig

DIRECTORY = Path(__file__).parents[2] / "docs" / "methods"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DIRECTORY.glob("*.md") if path.stem != "README"}
NEEDS = {
    "model.qk_norm_scope=full": ["model.qk_norm=true"],
    "optimizer.parametrization=complete_p": ["model.init=fixed"],
}


def test_index_is_up_to_date():
    assert (DIRECTORY / "README.md").read_text(encoding="utf-8") == index_page(DIRECTORY), "run `make docs`"


def test_every_recipe_has_a_page():
    assert set(RECIPES) - {"baseline"} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_page_has_all_facts_and_a_drawing(name):
    found = facts(PAGES[name])
    assert set(found) == {"title", *FACTS}
    assert all(found.values())
    assert PAGES[name].count("```") == 2, "one drawing"
    assert len(PAGES[name]) < 4000, "a page is short"


@pytest.mark.parametrize("name", PAGES)
def test_what_switches_it_on_is_valid_and_makes_a_difference(name):
    """`section.key: value` and recipe `name` in the row "switch on"."""
    row = facts(PAGES[name])["switch on"]
    overrides = [f"{key}={value}" for key, value in re.findall(r"`(\w+\.\w+): ([^`]+)`", row)]
    recipes = re.findall(r"recipe `(\w+)`", row)
    assert overrides or recipes
    if name in RECIPES:
        assert recipes == [name]
    for override in overrides:
        key, _, value = override.partition("=")
        section, field = key.split(".")
        config = load_config(None, [override, *NEEDS.get(override, [])])
        default = getattr(getattr(Config(), section), field)
        assert getattr(getattr(config, section), field) != default, f"{override} is the default"
        assert yaml.safe_load(value) is not None
    for recipe in recipes:
        assert ModelConfig(recipe=recipe) != ModelConfig(recipe="baseline")


def test_recipe_values_on_pages_are_those_of_the_recipes():
    """A page that names a recipe and a value of one of its knobs names the recipe's value."""
    checked = 0
    for name, page in PAGES.items():
        for key, value in re.findall(r"`model\.(\w+): ([^`]+)`, or recipe", facts(page)["switch on"]):
            assert RECIPES[name][key] == yaml.safe_load(value), (name, key)
            checked += 1
    assert checked >= 5


def test_every_stability_knob_is_on_a_page():
    fields = list(ModelConfig.model_fields)
    knobs = fields[fields.index("attention_input_norm") : fields.index("attention")]
    everything = "\n".join(PAGES.values())
    by_recipe = {key for fields in RECIPES.values() for key in fields}
    for knob in knobs:
        assert f"model.{knob}" in everything or knob in by_recipe, knob


def test_links_between_pages_lead_somewhere():
    for name, page in {**PAGES, "README": (DIRECTORY / "README.md").read_text()}.items():
        for link in re.findall(r"\]\(([\w/]+\.md)\)", page):
            assert (DIRECTORY / link).exists(), (name, link)
