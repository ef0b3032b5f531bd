"""Documentation is code that runs: every Python block is executed, every command, option, link and path exists, and the site builds."""

from __future__ import annotations

import ast
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import lz_compiler as lz
from lz_compiler.cli import app
from lz_compiler.options import Options
from lz_compiler.trust.descriptors import read
from lz_compiler.trust.policy import load_policy
from lz_compiler.zoo import LlamaConfig, llama

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")]
PAGES += sorted(ROOT.glob("docs/*.md"))
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.DOTALL)
MISSPELT = {"FREZE"}  # by intent, where a page shows the message
NOT_RUN = 1  # Python blocks that say why they are not run


def blocks(page: Path, *kinds: str) -> Iterator[re.Match[str]]:
    return (m for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m["kind"] in kinds)


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def assumed() -> dict[str, Any]:
    """What prose takes for granted: a model, its inputs, a paged cache."""
    torch.manual_seed(0)
    model, args, _ = llama(LlamaConfig(hidden=64, layers=1, heads=4, kv_heads=2, intermediate=96, vocab=128))
    pages = torch.randn(4, 16, 2, 32)
    return {
        "torch": torch, "lz": lz, "model": model, "ids": args[0], "batches": [args[0]] * 3,
        "q": torch.randn(2, 4, 1, 32), "k_cache": pages, "v_cache": pages.clone(),
        "block_table": torch.tensor([[0, 1], [2, 3]]), "seq_lens": torch.tensor([20, 32]),
    }  # fmt: skip


# These compile many cells.
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=pytest.mark.slow if p.stem in ("offline_plans", "README") else (), id=relative(p))
        for p in PAGES
        if any(blocks(p, "python"))
    ],
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, which is also the module `my_model` that pages speak of."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # pages are read beside a clone
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERZERO_MEASURE_BUDGET_S", "1")
    monkeypatch.setenv("LAYERZERO_RACE", "0")  # nothing else is compiled beside the plan
    module = types.ModuleType("my_model")
    monkeypatch.setitem(sys.modules, "my_model", module)
    vars(module).update(assumed())
    texts = [block["text"] for block in blocks(page, "python") if not block["why"]]
    if any("register(" in text for text in texts):  # what it adds is there for the whole process
        done = subprocess.run([sys.executable, "-c", "\n".join(texts)], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return
    for text in texts:
        exec(compile(text, relative(page), "exec"), vars(module))


def test_tables_of_claims_are_those_of_the_reports() -> None:
    spec = importlib.util.spec_from_file_location("claims", ROOT / "benchmarks" / "claims.py")
    assert spec is not None
    assert spec.loader is not None
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    held = page.partition("<!-- claims: begin -->\n")[2].partition("\n<!-- claims: end -->")[0]
    assert held == claims.tables(), "put the output of `python benchmarks/claims.py` between the markers"
    run = {"backend": "b", "capabilities": {}, "incomplete": "", "digest": "old"}
    assert claims.remark(run, {"b": "new"}) == "**the descriptor has changed since**"
    assert claims.remark(run, {"b": "old"}) == ""


def test_few_blocks_are_not_run() -> None:
    reasons = [(relative(page), m["why"]) for page in PAGES for m in blocks(page, "python") if m["why"]]
    assert len(reasons) <= NOT_RUN, reasons


def test_examples_of_files_are_read(tmp_path: Path) -> None:
    for page in PAGES:
        for block in blocks(page, "yaml"):
            (tmp_path / "policy.yaml").write_text(block["text"])
            assert load_policy(tmp_path / "policy.yaml", "docs").rules
        for block in blocks(page, "json") if page.name == "backends.md" else ():
            (tmp_path / "mine.json").write_text(block["text"])
            assert read(tmp_path / "mine.json", "mine").kernels


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every `lz ...`, `python benchmarks/...` and `make ...` in a block, an indented block or a code span."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        spans = [*re.findall(r"`([^`\n]+)`", text), *(line for m in blocks(page, "") for line in m["text"].splitlines())]
        for span in [*spans, *re.findall(r"^    (\S.*)$", text, re.MULTILINE)]:
            line = re.sub(r"\s{3,}.*|\s#.*", "", span.strip().removeprefix("$ ").removeprefix(".venv/bin/"))
            if re.match(r"(lz [a-z]|python benchmarks/|OMP_NUM_THREADS=1 python benchmarks/|make [a-z-]+( |$))", line):
                yield relative(page), shlex.split(line.removeprefix("OMP_NUM_THREADS=1 "))


def test_commands_and_their_options_exist() -> None:
    seen = 0
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, words in commands():
        seen += 1
        if words[0] == "make":
            assert words[1] in targets, (page, words)
            continue
        if words[0] == "python":
            strings = constants(ROOT / words[1])
            missing = [w for w in words[2:] if w.startswith("--") and w.partition("=")[0] not in strings]
        else:
            command: Any = get_command(app)
            for word in words[1:]:
                if not hasattr(command, "commands"):
                    break
                assert word in command.commands, (page, words)
                command = command.commands[word]
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            missing = [w for w in words[1:] if re.match(r"--?[a-z]", w) and w.partition("=")[0] not in known | {"--help"}]
        assert not missing, (page, words)
    assert seen > 50


def constants(script: Path) -> set[str]:
    """Every string in a script: among them its options."""
    found = {n.value for n in ast.walk(ast.parse(script.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found | {w for text in found for w in text.split()}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [t for t in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text) if not (page.parent / t).exists()]
    named = re.findall(r"`((?:lz_compiler|tests|benchmarks|docs|examples)/[\w./*-]+)`", text)
    assert not links + [p for p in named if not any(ROOT.glob(p.rstrip("/")))]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_names_of_the_package_exist(page: Path) -> None:
    """`lz.solve(...)` and `lz_compiler.planner.solve` in prose, extras of pip, and options as environment variables."""
    text = page.read_text(encoding="utf-8")
    wrong = []
    for name in re.findall(r"`(?:lz|lz_compiler)((?:\.\w+)+)(?=[`(\s])", BLOCK.sub("", text)):
        try:
            pkgutil.resolve_name(f"lz_compiler{name}")
        except (ImportError, AttributeError):
            wrong.append(name)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wrong += [extra for group in re.findall(r"lz-compiler\[([\w,-]+)\]", text) for extra in group.split(",") if extra not in extras]
    options = set(re.findall(r"LAYERZERO_([A-Z_]+[A-Z])", text)) - MISSPELT
    wrong += [name for name in options if name.lower() not in Options.__dataclass_fields__]
    assert not wrong


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr  # not --quiet, with which warnings do not count
    assert (tmp_path / "index.html").exists()
    assert "LayerZero chooses" in (tmp_path / "index.html").read_text()
    for page in tmp_path.rglob("*.html"):  # nothing is loaded from a network; links may lead there
        assert not re.findall(r'(?:src="|<link[^>]+(?:stylesheet|preload)[^>]+href=")(?:https?:)?//[^"]*', page.read_text(encoding="utf-8"))
