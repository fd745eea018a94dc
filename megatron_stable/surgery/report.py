"""``RUN/surgery.json``: what operations did to a run, with all numbers of their checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_stable.files import write_file
from megatron_stable.surgery.operating import Operated

FILE = "surgery.json"


def facts(source: Path, done: Operated) -> dict[str, Any]:
    """An operation, in plain values."""
    return {
        "source": str(source),
        "step": done.whole.step,
        "changes": {key: list(values) for key, values in done.changes.items()},
        "parameters": list(done.parameters),
        "verdict": done.continuity.verdict,
        **done.continuity.model_dump(mode="json"),
    }


def write_report(run: Path, source: Path, done: Operated) -> None:
    """Write it; an earlier one stays in the ledger's sentence. DataError: it cannot be written."""
    write_file(run / FILE, (json.dumps(facts(source, done), indent=1) + "\n").encode())
