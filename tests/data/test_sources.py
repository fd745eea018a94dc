"""A YAML file of sources: one stream each, by name and weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_stable.data import Blend, Stream, open_dataset, unrecorded, wanted
from megatron_stable.data.shards import shard_prefix
from megatron_stable.errors import ConfigError, DataError, MegatronStableError


@pytest.fixture
def folder(stream: Callable[..., Path], tmp_path: Path) -> Path:
    for i in range(3):
        stream(100, shard_prefix("web", i, 3))
    stream(50, "python")
    stream(60, "cpp")
    return tmp_path


def opened(folder: Path, text: str) -> object:
    (folder / "data.yaml").write_text(text)
    return open_dataset(str(folder / "data.yaml"), 8, seed=1)


GOOD = "sources:\n  web: {path: web, weight: 3}\n  code: {path: [pyth*, cpp], weight: 1}\n"


def test_sources_are_a_blend_by_name(folder: Path) -> None:
    blend = opened(folder, GOOD)
    assert isinstance(blend, Blend)
    assert [(part.indexed.prefix, part.indexed.tokens) for part in blend.parts] == [("web", 300), ("code", 110)]
    assert blend.stages.counts(4000) == {"web": 3000, "code": 1000}
    same = open_dataset({str(folder / "web"): 3, str(folder / "python"): 1}, 8, seed=1)
    assert [blend.sample(k).tolist() for k in range(0, 100, 4)] == [same.sample(k).tolist() for k in range(0, 100, 4)]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("weight: 3", "weight: 0", "source web has the weight 0, it must be a number above 0"),
        ("weight: 3", "weight: -1", "source web has the weight -1"),
        ("weight: 3", "weight: .nan", "source web has the weight nan"),
        ("weight: 3", "weight: many", "source web has the weight 'many'"),
        ("weight: 3", "weight: true", "source web has the weight True"),
        (", weight: 3", "", "source web must have a path and a weight"),
        ("weight: 3", "heft: 3", "source web must have a path and a weight, and nothing else"),
        ("path: web", "path: 7", "source web has the path 7"),
        ("path: web", "path: []", "source web has the path"),
        ("sources", "source", "does not list sources"),
        (GOOD, "sources: {}", "does not list sources"),
        (GOOD, "", "does not list sources"),
        (GOOD, "{", "is not YAML"),
        (GOOD, "sources: {1: {path: web, weight: 1}, '1': {path: python, weight: 1}}", "two sources of one name"),
    ],
)
def test_what_is_no_list_of_sources(folder: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        opened(folder, GOOD.replace(old, new))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("path, message", [("absent", "no dataset .*absent"), ("abs*", "no file is called .*abs")])
def test_absent_source(folder: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(folder, GOOD.replace("path: web", f"path: '{path}'"))
    assert caught.value.exit_code == 5


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(MegatronStableError, match=r"cannot read the data sources .*none\.yaml: No such file"):
        open_dataset(tmp_path / "none.yaml", 8, seed=1)


def test_weights_by_stage(folder: Path) -> None:
    text = "sources: {web: {path: web}, code: {path: [python, cpp], weight: 3}}"
    (folder / "data.yaml").write_text(text)
    staged = open_dataset(str(folder / "data.yaml"), 8, 1, [(0, {"web": 1}), (10, {"code": 1, "web": 1})])
    assert isinstance(staged, Blend)
    assert staged.stages.counts(14) == {"web": 12, "code": 2}, "weights of the file do not hold then"
    with pytest.raises(ConfigError, match=r"web must have a path and a weight: .*; or give weights by data.stages"):
        open_dataset(str(folder / "data.yaml"), 8, 1)
    with pytest.raises(ConfigError, match=r"a part of 'wob', which data.train does not name; it names web, code"):
        open_dataset(str(folder / "data.yaml"), 8, 1, [(0, {"web": 1}), (10, {"wob": 1})])


def test_a_source_that_is_listed_twice(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not YAML: (.|\n)*web is given twice"):
        opened(folder, "sources: {web: {path: web, weight: 1}, web: {path: cpp, weight: 1}}")


def test_what_a_run_trained_on_that_noted_no_stages() -> None:
    """It begins where its formula has come to: as many samples of each source as before."""
    known = unrecorded({"a/web": 0.7, "a/code": 0.3}, ())
    assert known is not None and known.counts(1000) == {"a/web": 700, "a/code": 300}
    now = {"b/web": Stream(paths="b/web", tokens=10, documents=1), "math": Stream(paths="math", tokens=9, documents=1)}
    order = known.resumed(1000, now, wanted({"b/web": 1, "math": 1}).stages)
    assert order.counts(1010) == {"b/web": 705, "a/code": 300, "math": 5}
    assert unrecorded(None, ()) is None
