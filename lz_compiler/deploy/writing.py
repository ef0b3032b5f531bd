"""What a baked file is written with: lines that fit a page, and Python functions of LayerZero's own."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

from torch.utils import _pytree as pytree

from .. import ops
from ..errors import PlanError

WIDTH = 140
CALLED = "torch.ops.lz.paged_attention.default("  # how generated code calls the reference of paged attention
PAGED = "_paged_attention"  # its name in the file


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Code with other names for its variables; attributes and keywords stay."""
    lines = text.encode().split(b"\n")  # ast counts bytes
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name) and n.id in names]
    for node in sorted(found, key=lambda n: (n.lineno, n.col_offset), reverse=True):
        line, start = lines[node.lineno - 1], node.col_offset
        lines[node.lineno - 1] = line[:start] + names[node.id].encode() + line[start + len(node.id.encode()) :]
    return b"\n".join(lines).decode()


def variables(text: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}


def free(name: str, taken: Collection[str]) -> str:
    """A name that is not taken yet."""
    while name in taken:
        name += "_"
    return name


def paged_attention() -> str:
    """The reference of paged attention, and what it calls, as functions of the file. Shapes were checked when the file was made."""
    return "\n\n\n".join([_source(ops._gathered, "_gathered"), _source(ops._paged_run, PAGED)])


def _source(function: Callable[..., Any], name: str) -> str:
    """A function without its types, which the file has no names for, and without its checks."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(made, ast.FunctionDef)
    made.name, made.returns = name, None
    for argument in made.args.args:
        argument.annotation = None
    made.body = [statement for statement in made.body if not ast.unparse(statement).startswith("_paged_check(")]
    text = re.sub(r"(?<![\w.])F\.", "torch.nn.functional.", ast.unparse(made))
    return "\n".join(part for line in text.splitlines() for part in wrapped(line))


def wrapped(line: str) -> list[str]:
    """A line of Python as lines of at most WIDTH columns, broken after commas inside brackets as far as there are any."""
    if len(line) <= WIDTH:
        return [line]
    shift, depth = len(line) - len(line.lstrip()), 0
    breaks: list[int] = []
    with suppress(tokenize.TokenError):  # the end of a line that goes on
        for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline):
            if token.type == tokenize.OP:
                depth += (token.string in "([{") - (token.string in ")]}")
                breaks += [shift + token.end[1]] if token.string == "," and depth else []
    lines: list[str] = []
    start, indent = 0, ""
    while len(indent) + len(line) - start > WIDTH:
        fitting = [b for b in breaks if start < b <= start + WIDTH - len(indent)]
        if not fitting:
            break
        lines.append(indent + line[start : fitting[-1]].lstrip() if start else line[: fitting[-1]])
        start, indent = fitting[-1], " " * (shift + 4)
    return [*lines, indent + line[start:].lstrip() if start else line]


def filled(text: str) -> str:
    """Prose at most WIDTH columns wide, its own line breaks kept."""
    return "\n".join(textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())


def render(spec: pytree.TreeSpec, leaves: list[str]) -> str:
    """The model's output structure as an expression of its leaves."""
    if spec.is_leaf():
        return leaves.pop(0)
    parts = [render(child, leaves) for child in spec.children()]
    if spec.type is dict:
        wrong = [key for key in spec.context if not isinstance(key, (str, int, float, bool, type(None))) or isinstance(key, Enum)]
        if wrong:
            raise PlanError(f"the model returns a dict with the key {wrong[0]!r}; baked files know texts and numbers. Wrap the model.")
        return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(spec.context, parts, strict=True)) + "}"
    if spec.type in (tuple, list):
        inner = ", ".join(parts)
        return f"[{inner}]" if spec.type is list else f"({inner},)" if parts else "()"
    raise PlanError(f"the model returns {spec.type.__name__}; baked files return tensors, tuples, lists and dicts. Wrap the model.")


def prose(words: str) -> str:
    """What stands in a plan as it may stand in a docstring: nothing that could end it."""
    return re.sub(r"[^\w .,:;()\[\]<>=+/*%-]", "?", words)


def pretty(value: Mapping[Any, Any]) -> str:
    lines = [part for k, v in value.items() for part in wrapped(f"    {k!r}: {v!r},")]
    return "\n".join(["{", *lines, "}"])


def identifier(kind: str, name: str, taken: Collection[str]) -> str:
    """A name in the file for what is stored as `name`."""
    return free(f"{kind}_{re.sub(r'[^A-Za-z0-9]+', '_', name.removeprefix('plain.').removeprefix('constant.'))}", taken)
