"""The configuration's documentation, made from the schema: the reference page and the commented file of `init`.

``python -m megatron_stable.config.reference FILE`` writes the page.
"""

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from megatron_stable.config.describe import entries, sections
from megatron_stable.config.notation import inline
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.config.sizes import SIZES

_INTRODUCTION = """\
# Configuration

<!-- Generated from megatron_stable/config/schema.py by `make docs`; edit the docstrings there. -->

A run is one YAML file of the sections below. Every key has a default, so a file holds what differs:

```yaml
model: {size: 85m, recipe: qk_norm_cap}
data: {tokenizer: data/tokenizer.model, train: data/train, validation: data/validation}
```

`megatron-stable init --size 85m --recipe qk_norm_cap --output config.yaml` writes a file that shows all of them, with
comments. On the command line, `section.key=value` takes precedence over the file; the value is YAML, such as
`data.train=corpus`, `optimizer.betas='[0.9, 0.99]'` or `model.attention_cap=null`. What ran is in the run's directory,
resolved, as `config.yaml`.

A key given beside `model.size` or `model.recipe` takes precedence over what the size or recipe sets. On the command
line, `model.size=` and `model.recipe=` replace everything in the file that sizes or recipes set.

An unknown key, a value out of range or two keys that contradict each other end the program with exit code 2 and one
line for each problem, before anything is started.
"""


def reference_page() -> str:
    """The reference page, as Markdown: each section with its keys, what they take, their defaults and their meaning."""
    parts = [_INTRODUCTION]
    for section, doc in sections().items():
        rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
        for entry in entries(section):
            cells = (f"`{entry.key}`", entry.allowed, f"`{inline(entry.info.default)}`", entry.doc)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append(f"## {section}\n\n{doc}\n\n" + "\n".join(rows) + "\n")
    parts.append(_table("Sizes", "`model.size` sets:", SIZES))
    parts.append(_table("Recipes", "`model.recipe` sets:", RECIPES))
    return "\n".join(parts)


def commented_yaml(config: Config, notes: Mapping[str, str] | None = None) -> str:
    """`config` as YAML with every key explained, and with a note at those, by dotted key, that have one.

    What follows from the size or the recipe is shown, but commented out, so that changing `size` or `recipe` in the
    file changes the model; :func:`~megatron_stable.config.load.load_config` makes the same configuration of it.
    """
    model = ModelConfig(size=config.model.size, recipe=config.model.recipe)
    named = {name for fields in (*SIZES.values(), *RECIPES.values()) for name in fields}
    lines = [
        "# Every key with its default; any of them may be left out.",
        "# docs/configuration.md has the same as tables; `key=value` on the command line takes precedence.",
    ]
    for section, doc in sections().items():
        lines += ["", *_comment(doc), f"{section}:"]
        for entry in entries(section):
            value = getattr(getattr(config, section), entry.name)
            follows = section == "model" and entry.name in named and getattr(model, entry.name) == value
            value = list(value) if isinstance(value, tuple) else value
            lines += _comment(f"{entry.doc} Takes {entry.allowed}." if entry.allowed != "text" else entry.doc, "  ")
            lines += _comment((notes or {}).get(entry.key, ""), "  ")
            lines.append(f"  {'# ' if follows else ''}{entry.name}: {inline(value)}")
    return "\n".join(lines) + "\n"


def _table(title: str, introduction: str, named: dict[str, dict[str, object]]) -> str:
    rows = ["| name | sets |", "|---|---|"]
    for name, fields in named.items():
        given = ", ".join(f"`{key}: {inline(value)}`" for key, value in fields.items())
        rows.append(f"| `{name}` | {given or 'nothing: the defaults'} |")
    return f"## {title}\n\n{introduction}\n\n" + "\n".join(rows) + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference_page(), encoding="utf-8")
