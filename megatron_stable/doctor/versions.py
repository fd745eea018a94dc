"""What is installed: the same everywhere, as this package asks for, and none that is known to compute wrongly."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_stable.doctor.finding import Finding, Verdict

DEEPSPEED = "https://github.com/deepspeedai/DeepSpeed/issues/"
TOLD = ("torch", "deepspeed", "megatron-stable", "numpy")


class KnownBad(NamedTuple):
    """Versions of a package that are known to do something wrong: from ``first``, and before ``mended``."""

    package: str
    first: str
    mended: str
    wrong: str
    source: str


KNOWN_BAD = (
    KnownBad(
        "deepspeed", "0", "0.18.3",
        "under a pipeline, gradients are the sum over micro batches and not their mean", f"{DEEPSPEED}7773",
    ),
    KnownBad(
        "deepspeed", "0.18.3", "0.19.3",
        "under a pipeline, gradients are divided by the micro batches once more on each earlier stage",
        f"{DEEPSPEED}8152",
    ),
    KnownBad(
        "deepspeed", "0.18.6", "0.18.11",
        "in bf16 under ZeRO-1, the gradient of the last micro batch is left out of the reduction", f"{DEEPSPEED}7985",
    ),
    KnownBad(
        "flash-attn", "0", "2.6.2", "softcap, which model.attention_cap needs, is not to be relied on",
        "https://github.com/mosaicml/llm-foundry/blob/main/llmfoundry/models/mpt/configuration_mpt.py",
    ),
)  # fmt: skip


def check_versions() -> list[Finding]:
    """All about versions, on this machine."""
    found = {name: version(name) for name in {*TOLD, *(bad.package for bad in KNOWN_BAD)} if installed(name)}
    return [told(found), *known_bad(found), *unmet()]


def told(found: Mapping[str, str]) -> Finding:
    """The versions that matter."""
    parts = [f"python {platform.python_version()}", *(f"{name} {found[name]}" for name in TOLD if name in found)]
    if torch.version.cuda is not None:
        parts.append(f"CUDA {torch.version.cuda}")
        parts.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
    return Finding("versions", ", ".join(parts), alike=True)


def known_bad(found: Mapping[str, str]) -> Iterator[Finding]:
    """Versions of the table above, among those that were found."""
    for bad in KNOWN_BAD:
        have = found.get(bad.package)
        if have is not None and Version(bad.first) <= Version(have) < Version(bad.mended):
            text = f"{bad.package} {have} is known to be wrong: {bad.wrong} ({bad.source})"
            remedy = f"pip install '{bad.package}>={bad.mended}'"
            yield Finding("known-bad versions", text, Verdict.FAILURE, remedy)


def unmet() -> Iterator[Finding]:
    """What this package asks for and does not find."""
    for line in requires("megatron-stable") or ():
        asked = Requirement(line)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        have = version(asked.name) if installed(asked.name) else None
        if have is None or not asked.specifier.contains(have, prereleases=True):
            text = f"{asked.name} is {have or 'not installed'}; the tests have seen {asked.name}{asked.specifier}"
            yield Finding("requirements", text, Verdict.FAILURE, f"pip install '{asked.name}{asked.specifier}'")


def installed(name: str) -> bool:
    """Whether a distribution is there."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
