"""What `megatron-stable plan` says of each example, and the table of them in README.md.

python examples/pages.py            # writes plans/NAME.txt and the table
python examples/pages.py 10b        # one plan only
"""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from megatron_stable.analysis.machines import machine
from megatron_stable.analysis.plan import Plan, make_plan
from megatron_stable.commands.plan import plan
from megatron_stable.config.load import load_config

HERE = Path(__file__).parent
NAMES = ("laptop", "830m", "1b", "3b", "7b", "10b", "13b", "30b")
BEGIN, END = "<!-- written by pages.py -->\n", "<!-- until here -->\n"
HEADINGS = ("", "parameters", "tokens", "ranks", "layout", "memory of a rank", "predicted", "after")


def ranks(name: str) -> int:
    """As many as the first line of the configuration names."""
    return int(re.findall(r"^# ranks: (\d+)", (HERE / f"{name}.yaml").read_text())[0])


def hardware(name: str) -> str:
    """The machine that an example is planned for."""
    return str(HERE / "plans" / "laptop_machine.yaml") if name == "laptop" else "h100"


def text_of(name: str) -> str:
    """What `megatron-stable plan` prints, below the command."""
    on = "examples/plans/laptop_machine.yaml" if name == "laptop" else "h100"
    printed = StringIO()
    with redirect_stdout(printed):
        plan(
            overrides=None, config=HERE / f"{name}.yaml", ranks=ranks(name), nodes=None, machine_name=hardware(name),
            tokens=None, vocab_size=None, search_layouts=False, as_json=False,
        )  # fmt: skip
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    command = f"megatron-stable plan --config examples/{name}.yaml --ranks {ranks(name)} --machine {on}"
    return "\n".join([f"$ {command}", *lines, ""])


def short(count: float) -> str:
    """A number in three digits and a letter."""
    text = f"{count:.2e}"
    size = int(text.partition("e")[2]) // 3
    return f"{float(text) / 1000**size:g} {' kMBT'[size]}"


def row(name: str) -> str:
    """A line of the table."""
    found: Plan = make_plan(load_config(HERE / f"{name}.yaml"), ranks(name), machine(hardware(name)), None)
    parallel, after = found.config.parallel, re.findall(r"^# after: (.+)", (HERE / f"{name}.yaml").read_text(), re.M)[0]
    split = parallel.tensor * parallel.pipeline
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "DP": found.world // split}
    layout = " x ".join(f"{key} {size}" for key, size in sizes.items() if size > 1)
    memory = max(stage.total for stage in found.stages)
    time = f"{found.days:.0f} days" if found.days > 1 else f"{found.days * 24:.0f} h"
    cells = (
        f"[{name}]({name}.yaml)",
        short(found.parameters),
        short(found.tokens),
        f"{found.world}",
        layout + (", SP" if parallel.sequence else ""),
        f"{memory / 1e9:.1f} of {found.machine.usable / 1e9:.0f} GB",
        f"[{time}](plans/{name}.txt)",
        after,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All examples."""
    return "\n".join([f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *map(row, NAMES), ""])


def main() -> None:
    names = sys.argv[1:] or NAMES
    for name in names:
        (HERE / "plans").mkdir(exist_ok=True)
        (HERE / "plans" / f"{name}.txt").write_text(text_of(name))
    if not sys.argv[1:]:
        page = (HERE / "README.md").read_text()
        before, rest = page.split(BEGIN)
        (HERE / "README.md").write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
