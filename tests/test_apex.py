"""What bears the name apex, and the adapter to NVIDIA's kernels; numbers on a GPU are in tests/gpu/test_apex.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_stable import apex
from megatron_stable.config.checks import check
from megatron_stable.config.schema import Config, RunConfig
from megatron_stable.errors import ConfigError
from tests.harness.ranks import RankError, Ranks

REAL = apex.find().usable  # where NVIDIA's is installed, "nothing there" cannot be tried


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that comes first on ``sys.path``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", *apex.EXTENSIONS.values())]:
        del sys.modules[name]


def pypi(folder: Path) -> None:
    """The layout of PyPI's apex 0.9.10dev, a toolkit for Pyramid, whose import needs Pyramid."""
    (folder / "apex" / "lib").mkdir(parents=True)
    (folder / "apex" / "__init__.py").write_text("from pyramid_mailer.interfaces import IMailer\n")
    for name in ("models.py", "views.py", "forms.py", "lib/libapex.py", "lib/flash.py"):
        (folder / "apex" / name).touch()


def nvidia(folder: Path, extensions: tuple[str, ...] = ()) -> None:
    """The layout of NVIDIA's, whose code nobody may run to find out what it is."""
    for package in ("optimizers", "normalization", "multi_tensor_apply"):
        (folder / "apex" / package).mkdir(parents=True)
        (folder / "apex" / package / "__init__.py").touch()
    (folder / "apex" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (folder / "apex" / "optimizers" / "fused_adam.py").touch()
    for name in extensions:
        (folder / f"{name}.py").write_text("raise AssertionError('imported')\n")


@pytest.mark.skipif(REAL, reason="NVIDIA's apex is installed")
def test_nothing_there() -> None:
    found = apex.find()
    assert not found.usable and found.absent and apex.BUILD in found.sentence


def test_the_package_of_pypi_is_named(folder: Path) -> None:
    pypi(folder)
    found = apex.find()
    assert not found.usable and not found.absent
    assert "not NVIDIA's" in found.sentence and "Pyramid" in found.sentence and "pip uninstall apex" in found.sentence
    assert str(folder / "apex") in found.sentence and "apex" not in sys.modules


@pytest.mark.skipif(REAL, reason="its extensions are installed")
def test_a_build_without_kernels_is_named(folder: Path) -> None:
    nvidia(folder)
    found = apex.find()
    assert not found.usable and not found.absent and "AdamW, RMSNorm" in found.sentence and apex.BUILD in found.sentence
    (folder / "amp_C.py").touch()
    assert "kernels (RMSNorm)" in apex.find().sentence


def test_nvidias_is_found_without_running_its_code(folder: Path) -> None:
    nvidia(folder, tuple(apex.EXTENSIONS.values()))
    assert apex.find() == (True, f"NVIDIA's apex in {folder / 'apex'}", False)


def test_one_that_breaks_on_import_is_not_taken(folder: Path) -> None:
    nvidia(folder, tuple(apex.EXTENSIONS.values()))
    found = apex.try_out(torch.device("cpu"))
    assert not found.usable and "does not work here (AssertionError: imported)" in found.sentence
    assert apex.taken() is None


# the two names that the adapter takes, computing on a CPU what the kernels compute on a GPU, by apex's formulas
AMP_C = """
import torch
def multi_tensor_adam_capturable(chunk, skip, lists, lr, beta1, beta2, eps, step, mode, correct, decay, inverse):
    assert mode == 1 and correct == 1 and skip.dtype == step.dtype == torch.int32 and skip.item() == 0
    assert lr.dtype == inverse.dtype == torch.float32
    for g, p, m, v in zip(*lists):
        g.mul_(INVERSE)
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        unbiased = m / (1 - beta1**step), v / (1 - beta2**step)
        p.sub_(lr * (unbiased[0] / (unbiased[1].sqrt() + eps) + DECAY * p))
"""
NORMALIZATION = """
def fused_rms_norm_affine(x, weight, shape, eps, memory_efficient=False):
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)
"""


def computing(folder: Path, decay: str, inverse: str = "inverse") -> None:
    nvidia(folder, tuple(apex.EXTENSIONS.values()))
    (folder / "apex" / "__init__.py").write_text("")
    (folder / "amp_C.py").write_text(AMP_C.replace("DECAY", decay).replace("INVERSE", inverse))
    (folder / "fused_layer_norm_cuda.py").write_text("")
    (folder / "apex" / "normalization" / "fused_layer_norm.py").write_text(NORMALIZATION)


@pytest.mark.skipif(REAL, reason="NVIDIA's extensions would be imported")
def test_kernels_with_apexs_formula_pass_the_comparison_and_wrong_ones_do_not(folder: Path) -> None:
    computing(folder, "decay")
    assert apex.try_out(torch.device("cpu")).usable
    assert apex.taken() is None, "to try is not to take"


@pytest.mark.skipif(REAL, reason="NVIDIA's extensions would be imported")
@pytest.mark.parametrize(("decay", "inverse"), [("0.5 * decay", "inverse"), ("decay", "1")])
def test_kernels_that_compute_something_else_are_named(folder: Path, decay: str, inverse: str) -> None:
    computing(folder, decay, inverse)
    found = apex.try_out(torch.device("cpu"))
    assert not found.usable and "computes AdamW otherwise than PyTorch" in found.sentence
    assert isinstance(sys.modules["amp_C"], ModuleType)


def test_require_and_deterministic_contradict_each_other() -> None:
    config = Config.model_validate({"run": {"apex": "require", "deterministic": True}, "model": {"vocab_size": 61}})
    with pytest.raises(ConfigError, match=r"run\.apex require and run\.deterministic true"):
        check(config)


def choose(mode: str) -> str | None:
    from megatron_stable.training.kernels import choose_kernels

    return choose_kernels(RunConfig.model_validate({"apex": mode}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_silent_and_require_says_why(ranks: Ranks) -> None:
    assert ranks.run(2, choose, "auto") == [None, None]
    with pytest.raises(RankError, match=r"run\.apex is require, but there is no GPU .*or set run\.apex=auto"):
        ranks.run(2, choose, "require")
