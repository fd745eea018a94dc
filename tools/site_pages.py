"""Pages of the site that lie elsewhere in the repository; MkDocs calls this (mkdocs.yml)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
SHOWN = (".md", ".yaml", ".txt", ".sh", ".sbatch")  # of the examples


def on_config(config: Any) -> Any:
    """Name the pages of a folder, where the navigation names the folder."""
    for section in config.nav:
        (title, target), *_ = section.items()
        if isinstance(target, str) and target.endswith("/"):
            folder = ROOT / "docs" / target
            names = sorted(page.name for page in folder.glob("*.md") if page.name != "README.md")
            section[title] = [target + name for name in ["README.md", *names]]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page, the changelog, and the examples as they are."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    texts = [path for path in sorted((ROOT / "examples").rglob("*")) if path.suffix in SHOWN or path.name == "hosts"]
    for path in [ROOT / "constraints.txt", *texts]:
        files.append(File.generated(config, str(path.relative_to(ROOT)), content=path.read_text()))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Links as they are from where the page is on the site."""
    if page.file.src_uri in PAGES.values():
        text = text.replace("](docs/", "](")
    text = re.sub(r"\]\((\.\./)?examples/?\)", "](examples/README.md)", text)
    text = text.replace("](../examples/", "](examples/")
    return text.replace("](../docs/", "](../") if page.file.src_uri.startswith("examples/") else text
