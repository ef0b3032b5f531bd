"""What the site takes from outside of docs/: README as its first page, the results of benchmarks, and the other pages of the root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
RESULTS = sorted(ROOT.glob("benchmarks/results/*.md"), reverse=True)
PAGES = {"index.md": ROOT / "README.md", "examples/README.md": ROOT / "examples" / "README.md"}
PAGES |= {name: ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}
PAGES |= {f"benchmarks/results/{path.name}": path for path in RESULTS}


LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*|)\)")


def on_files(files: Any, config: Any) -> Any:
    for uri, path in PAGES.items():
        level = InclusionLevel.NOT_IN_NAV if path in RESULTS else InclusionLevel.UNDEFINED  # their index is
        files.append(File.generated(config, uri, content=path.read_text(encoding="utf-8"), inclusion=level))
    rows = [f"- [{path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}]({path.name})" for path in RESULTS]
    text = "# Benchmarks\n\nEach page has its date, versions and command; the scripts are in `benchmarks/`.\n\n"
    files.append(File.generated(config, "benchmarks/results/index.md", content=text + "\n".join(rows) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, turned to where the site has the page; code is named, not linked."""
    uri = page.file.src_uri
    source = PAGES.get(uri, ROOT / "docs" / uri)
    known = {path.resolve(): name for name, path in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.groups()
        path = (source.parent / target).resolve()
        place = known.get(path) or (path.relative_to(ROOT / "docs").as_posix() if path.is_relative_to(ROOT / "docs") else None)
        if place is None:
            named = path.relative_to(ROOT).as_posix()
            return f"`{named}`" if text.strip("`") in named else f"{text} (`{named}`)"
        return f"[{text}]({'../' * uri.count('/')}{place}{anchor})"

    return LINK.sub(link, markdown)
