"""docs/probes.md is what the table of probes says."""

from __future__ import annotations

from pathlib import Path

from megatron_stable.records.probes_reference import probes_page
from megatron_stable.stability.probes import PROBES

PAGE = Path(__file__).parents[2] / "docs" / "probes.md"


def test_the_page_is_up_to_date_and_has_every_probe() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == probes_page(), "run `make docs`"
    for probe in PROBES.values():
        assert f"| `{probe.name}" in text or f"`{probe.name}`" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(PROBES)
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows), "five cells each"
