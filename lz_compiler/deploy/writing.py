"""What a baked file is written with: lines that fit a page, and Python functions of LayerZero's own."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .. import ops

WIDTH = 140
CALLED = "torch.ops.lz.paged_attention.default("  # how generated code calls the reference of paged attention
PAGED = "_paged_attention"  # its name in the file


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
