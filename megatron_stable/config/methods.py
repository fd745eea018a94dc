"""The index of docs/methods: which methods there are, from the pages' own tables, and which knobs each recipe turns.

``python -m megatron_stable.config.methods docs/methods`` writes ``README.md`` there.
"""

import sys
from pathlib import Path

from megatron_stable.config.notation import inline
from megatron_stable.config.recipes import RECIPES

FACTS = ("symptom", "formula", "switch on", "default", "cost", "source", "evidence")

_INTRODUCTION = """\
# Methods

<!-- Generated from the pages of this directory and megatron_stable/config/recipes.py by `make docs`. -->

What keeps training stable, one page each: symptom, formula, where it sits, default, cost, source, and how sure that
is. A recipe is a set of values of `model`; a key given beside `model.recipe` takes precedence, and every knob can be
set alone.

```yaml
model: {size: 85m, recipe: qk_norm, attention_cap: 50.0}    # the same as recipe qk_norm_cap
```
"""


def facts(page: str) -> dict[str, str]:
    """What a page says in the table at its top: its title, and :data:`FACTS`."""
    lines = page.splitlines()
    found = {"title": lines[0].removeprefix("# ")}
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 2 and cells[0] in FACTS:
            found.setdefault(cells[0], cells[1])
    return found


def index_page(directory: Path) -> str:
    """The index of the pages in ``directory``, as Markdown."""
    pages = {path.stem: facts(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.md"))}
    pages.pop("README", None)
    methods = ["| method | symptom | formula | switch on |", "|---|---|---|---|"]
    for name, page in pages.items():
        cells = (f"[{page['title']}]({name}.md)", page["symptom"], page["formula"], page["switch on"])
        methods.append("| " + " | ".join(cells) + " |")
    recipes = ["| `model.recipe` | sets | page |", "|---|---|---|"]
    for name, fields in RECIPES.items():
        given = ", ".join(f"`{key}: {inline(value)}`" for key, value in fields.items())
        link = f"[{name}]({name}.md)" if name in pages else ""
        recipes.append(f"| `{name}` | {given or 'nothing: the defaults'} | {link} |")
    return "\n".join([_INTRODUCTION, *methods, "", "## Recipes", "", *recipes, ""])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "README.md").write_text(index_page(target), encoding="utf-8")
