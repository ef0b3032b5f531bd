"""What a baked file is written with: lines that fit a page, and Python functions of LayerZero's own."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
import types
from collections.abc import Collection, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

from torch.utils import _pytree as pytree

from .. import ops
from ..backends.library import Library
from ..errors import PlanError

WIDTH = 140
CALLED = re.compile(r"torch\.ops\.lz\.(?!attention_brgemm\b)(\w+)\.default\b")  # how generated code calls an operator of LayerZero


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


def functions(operator: str) -> dict[str, str]:
    """What an operator of LayerZero runs in Python, and what that calls, as functions of the file by their names there; the operator's
    own is `_operator`. PlanError where there is no such form."""
    found: dict[str, str] = {}
    _write(ops.RUNS.get(operator), f"_{operator}", found)
    return found


def _write(function: Any, name: str, found: dict[str, str]) -> None:
    if inspect.isfunction(function) and function.__name__ != "<lambda>" and name not in found:
        (made,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        assert isinstance(made, ast.FunctionDef)
        made.name, found[name] = name, ""
        text = ast.unparse(_Apart(function, found).visit(made))
        found[name] = "\n".join(part for line in text.splitlines() for part in wrapped(line))
    elif name not in found:
        raise no_form(f"{name.removeprefix('_')}, which an operator calls,")


def no_form(what: str) -> PlanError:
    return PlanError(f"{what} has no form without LayerZero yet. Solve with a policy that denies it, or lz.compile(plan=...).")


class _Apart(ast.NodeTransformer):
    """A function apart from its module: without types, which the file has no names for, and checks, since shapes were checked when the
    file was made; what it calls is written to `found`."""

    def __init__(self, function: types.FunctionType, found: dict[str, str]) -> None:
        self.found = found
        self.known = {n: v for n, v in function.__globals__.items() if n not in function.__code__.co_varnames}

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        node.body = [statement for statement in node.body if not ast.unparse(statement).startswith("_paged_check(")]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        owner, _, method = ast.unparse(node.func).rpartition(".")
        library = self.known.get(owner)
        if isinstance(library, Library) and method == "load":
            module = ast.unparse(node.args[0]) if node.args else repr(library.module)
            return ast.parse(f"importlib.import_module({module})", mode="eval").body
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self.known:
            return node
        value = self.known[node.id]
        home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
        if isinstance(value, int | float | str):
            text = repr(value)
        elif home.partition(".")[0] in ("torch", "importlib"):
            text = home if isinstance(value, types.ModuleType) else f"{home}.{node.id}"
        else:
            text = node.id
            _write(value, text, self.found)
        return ast.parse(text, mode="eval").body


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
