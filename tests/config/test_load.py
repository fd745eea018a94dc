"""Reading a configuration: what is accepted, and the words for what is not."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.config.load import dump_config, load_config
from megatron_stable.config.schema import Config, DataConfig, ModelConfig, RunConfig
from megatron_stable.errors import ConfigError


def problems(path: Path | None = None, *overrides: str) -> list[str]:
    """The lines of the error that loading raises, without the heading of a list."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "pydantic" not in message and "http" not in message and "type=" not in message
    heading, *lines = message.splitlines()
    return [line.strip() for line in lines] or [heading]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_nothing_given_is_the_defaults():
    assert load_config() == Config()


def test_empty_file_and_empty_sections_are_the_defaults(write):
    assert load_config(write("# nothing\n")) == Config()
    assert load_config(write("model:\noptimizer:\n  # learning_rate: 1\n")) == Config()


def test_file_then_overrides(write):
    path = write("run: {steps: 7000}\noptimizer: {learning_rate: 0.01}\n")
    config = load_config(path, ["optimizer.learning_rate=0.02", "data.train={a: 1, b/c: 0.5}", "model.kv_heads=null"])
    assert config.run.steps == 7000
    assert config.optimizer.learning_rate == 0.02
    assert config.data.train == {"a": 1.0, "b/c": 0.5}
    assert config.model.kv_heads is None


@pytest.mark.parametrize("number", ["3e-4", "3E-4", "3.0e-4", ".0003", "0.3e-03", "+3e-4", "0.0003"])
def test_numbers_in_every_notation(write, number):
    assert load_config(write(f"optimizer: {{learning_rate: {number}}}")).optimizer.learning_rate == 3e-4
    assert load_config(None, [f"optimizer.learning_rate={number}"]).optimizer.learning_rate == 3e-4


def test_integers_in_exponent_notation():
    assert load_config(None, ["run.steps=2e3"]).run.steps == 2000
    assert load_config(None, ["run.steps=1_000_000"]).run.steps == 1_000_000


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2024-01-01", "007", "3e4", "true", "1.5", "~user/run", "a=b"])
def test_text_override_is_taken_as_it_is_written(text):
    assert load_config(None, [f"run.directory={text}"]).run.directory == text


def test_size_and_recipe_fill_in_below_what_is_given(write):
    model = load_config(write("model: {size: 85m, recipe: qk_norm_cap, layers: 6, attention_cap: 30}")).model
    assert (model.layers, model.hidden, model.heads) == (6, 768, 12)
    assert (model.qk_norm, model.attention_cap) == (True, 30.0)


def test_size_and_recipe_overrides_act_on_a_resolved_file(write):
    path = write(dump_config(load_config(None, ["model.size=tiny", "model.recipe=qk_norm_cap"])))
    model = load_config(path, ["model.size=85m", "model.recipe=baseline", "model.layers=5"]).model
    assert model == ModelConfig(size="85m", recipe="baseline", layers=5)
    assert load_config(path, ["run.steps=5000"]).model == ModelConfig(size="tiny", recipe="qk_norm_cap")


def test_aliased_sections_are_overridden_apart(write):
    path = write("checkpoint: &often {every: 10}\nevaluation: *often\n")
    config = load_config(path, ["checkpoint.every=20"])
    assert (config.checkpoint.every, config.evaluation.every) == (20, 10)


@settings(deadline=None)
@given(
    directory=st.text(st.characters(exclude_categories=["Cs"])),
    steps=st.integers(1000, 10**12),
    rate=st.floats(1e-3, 1e6),
    eps=st.floats(1e-300, 1e300),
    blend=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.floats(1e-9, 1e9), min_size=1),
    size=st.sampled_from([None, "tiny", "85m", "830m"]),
    vocabulary=st.one_of(st.none(), st.integers(2, 300_000)),
)
def test_dump_loads_back_the_same(tmp_path_factory, directory, steps, rate, eps, blend, size, vocabulary):
    config = Config(
        run=RunConfig(directory=directory, steps=steps),
        model=ModelConfig(size=size, vocab_size=vocabulary, recipe="qk_norm", qk_norm=False),
        data=DataConfig(train=blend, validation=directory),
        optimizer={"learning_rate": rate, "eps": eps, "betas": (0.5, 0.999)},
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("text", ["no", "3e4", "1:30", "null", "2024-01-01", "~", "0x10", "- a", "5"])
def test_dump_is_read_alike_by_other_yaml_readers(text):
    assert yaml.safe_load(dump_config(Config(run=RunConfig(directory=text))))["run"]["directory"] == text


def test_dump_holds_every_field_resolved():
    held = yaml.safe_load(dump_config(load_config(None, ["model.size=85m", "model.recipe=qk_norm_cap"])))
    assert list(held) == list(Config.model_fields)
    assert set(held["model"]) == set(ModelConfig.model_fields)
    assert (held["model"]["layers"], held["model"]["attention_cap"]) == (12, 50.0)


# what is refused


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.learning_rate", "optimizer.learning_rate"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("optimzer.learning_rat", "optimizer.learning_rate"),
        ("tensor-model-parallel-size", "parallel.tensor"),
        ("num_layers", "model.layers"),
        ("model.headss", "model.heads"),
        ("modle", "model"),
        ("every", "checkpoint.every or logging.every or evaluation.every"),
        ("sequence_lenght", "model.sequence_length"),
    ],
)
def test_unknown_key_names_the_nearest(write, key, meant):
    section, _, name = key.rpartition(".")
    in_file = problems(write(f"{section}: {{{name}: 1}}" if section else f"{name}: 1"))[0]
    in_override = problems(None, f"{key}=1")[0]
    for message in (in_file, in_override):
        if section not in ("optimiser", "optimzer") or message is in_override:
            assert f"{key}: unknown key; did you mean {meant}?" in message


def test_unknown_section_names_the_nearest(write):
    assert "optimiser: unknown key; did you mean optimizer?" in problems(write("optimiser: {eps: 1}"))[0]


def test_unknown_key_without_a_near_one():
    (message,) = problems(None, "zzzz.qqqq=1")
    assert "zzzz.qqqq: unknown key" in message and "did you mean" not in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps=0", ["run.steps", "0 ", "an integer >= 1"]),
        ("run.steps=1.5", ["run.steps", "1.5", "an integer >= 1"]),
        ("run.steps=many", ["run.steps", '"many"', "an integer >= 1"]),
        ("run.steps=true", ["run.steps", "true", "an integer >= 1"]),
        ("run.steps=null", ["run.steps", "null", "an integer >= 1"]),
        ("run.steps=", ["run.steps", "null", "an integer >= 1"]),
        ("run.steps=[1]", ["run.steps", "[1]", "an integer >= 1"]),
        ("model.dropout=1", ["model.dropout", "a number >= 0 and < 1"]),
        ("model.bias=maybe", ["model.bias", '"maybe"', "true or false"]),
        ("model.norm=batchnorm", ["model.norm", '"batchnorm"', "layernorm, rmsnorm"]),
        ("model.size=86m", ["model.size", '"86m"', "85m", "302m"]),
        ("model.size=[tiny]", ["model.size", '["tiny"]', "tiny"]),
        ("model.recipe={a: 1}", ["model.recipe", "qk_norm_cap"]),
        ("model.kv_heads=0", ["model.kv_heads", "an integer >= 1 or null"]),
        ("model.activation_checkpointing=0", ["model.activation_checkpointing", "none, full or an integer >= 1"]),
        ("model.activation_checkpointing=true", ["model.activation_checkpointing", "true"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate", "Infinity", "a number >= 0"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate", "NaN", "a number >= 0"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas", "[0.9, 1.0]", "< 1"]),
        ("optimizer.betas=0.9", ["optimizer.betas", "0.9", "[a number >= 0 and < 1, a number >= 0 and < 1]"]),
        ("parallel.zero_stage=0", ["parallel.zero_stage", "1, 2, 3", "With one data-parallel rank, stage 1"]),
        ("data.train={}", ["data.train", "{}", "text or {text: a number > 0, ...} or null"]),
        ("data.stages=[[0, {a: 0}]]", ["data.stages", '[[0, {"a": 0}]]', "a number > 0", "[sample, {source: weight"]),
        ("data.stages=[[0, {}]]", ["data.stages", "[[0, {}]]", "a number > 0"]),
        ("data.stages=[[-1, {a: 1}]]", ["data.stages", "an integer >= 0"]),
        ("data.train={a: 0}", ["data.train", '{"a": 0}', "a number > 0"]),
        ("precision.initial_scale_power=33", ["precision.initial_scale_power", "33", "<= 32"]),
    ],
)
def test_wrong_value_names_field_value_and_what_is_allowed(override, words):
    (message,) = problems(None, override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps", "write section.field=value"),
        ("model={size: tiny}", "model is a section"),
        ("data.train={a", "data.train={a: the value is not valid YAML"),
        ("run.steps=" + "[" * 5000, "not valid YAML"),
        ("run.steps=" + "1" * 5000, "not valid YAML"),
    ],
)
def test_malformed_override(override, words):
    (message,) = problems(None, override)
    assert words in message


def test_all_problems_at_once(write):
    path = write("""
model: {headz: 4, hidden: -1, attention: sdpa, attention_cap: 50}
batch: 7
run: {steps: soon}
""")
    found = problems(path, "lr=1", "parallel.zero_stage=2", "parallel.pipeline=2")
    expected = [
        "lr: unknown key; did you mean optimizer.learning_rate?",
        "model.headz: unknown key; did you mean model.heads?",
        "model.hidden: -1 is not allowed",
        "batch: 7 is not a section",
        'run.steps: "soon" is not allowed',
        "model.attention sdpa cannot compute model.attention_cap 50",
        "parallel.zero_stage 2",
    ]
    assert len(found) == len(expected)
    for words in expected:
        assert sum(line.startswith(words) for line in found) == 1, words


def test_no_conflict_is_blamed_on_a_value_that_is_already_refused():
    assert len(problems(None, "model.hidden=abc", "model.heads=3")) == 1
    assert len(problems(None, "model.hiden=300", "model.heads=3")) == 1
    assert len(problems(None, "model.size=86m", "model.heads=3")) == 1
    assert len(problems(None, "model.heads=3")) == 1  # and it is one where nothing else is wrong


def test_number_of_problems_and_file_are_in_the_heading(write):
    path = write("run: {steps: 0, seed: -1}")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: 2 problems\n")) as caught:
        load_config(path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {steps: 1\nmodel: 2\n", "line 2, column 6: not valid YAML"),
        ("run:\n\tsteps: 1\n", "line 2, column 1: not valid YAML"),
        ("run:\n  steps: 10\n  seed: 3\n  steps: 20\n", "line 4, column 3: not valid YAML: steps is given twice"),
        ("run: !!python/object/apply:os.system [true]\n", "line 1, column 6: not valid YAML"),
        ("- run\n- model\n", 'holds ["run", "model"], not the sections run, model'),
        ("just text\n", 'holds "just text"'),
        ("optimizer.learning_rate: 3\n", "write it as a section, `optimizer:` with `learning_rate: ...` below it"),
        ("run: [1, 2]\n", "run: [1, 2] is not a section"),
        ("run: {1: 2}\n", "run.1: unknown key"),
        ("7: 2\n", "7: unknown key"),
        ("run: &run\n  steps: *run\n", "run.steps"),
    ],
)
def test_file_that_is_no_configuration(write, text, words):
    path = write(text)
    (message,) = problems(path)
    assert str(path) in message and words in message


def test_file_of_bytes(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\x80\x02\xff\x00\x01")
    assert "not valid YAML" in problems(path)[0]


def test_file_missing_or_a_directory(tmp_path):
    assert problems(tmp_path / "absent.yaml") == [f"{tmp_path / 'absent.yaml'}: no such file or directory"]
    assert problems(tmp_path) == [f"{tmp_path}: is a directory"]
