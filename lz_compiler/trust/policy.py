"""What a user rules about kernels: lock, prefer, avoid, deny.

A rule holds for an operation (a product, a convolution, an attention) that meets its conditions, whichever region covers it:
a rule for `linear` holds also for the linears inside a merged product.
"""

from __future__ import annotations

import functools
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PolicyError, unknown
from ..kv_cache import DEVICES
from ..plan_io import read_limited

if TYPE_CHECKING:
    from ..backends.base import SelectionContext

MAX_BYTES, MAX_RULES, MAX_TEXT = 1 << 17, 1000, 200
FACTORS = {"lock": 1.0, "prefer": 0.5, "avoid": 2.0, "deny": 1.0}
NAMES = ("op", "kernel", "backend", "device", "dtype")
SIZES: Mapping[str, tuple[str, ...]] = {
    "linear": ("rows", "in_features", "out_features"),
    "merged_linear": ("rows", "in_features", "out_features", "count"),
    "gated_linear": ("rows", "in_features", "out_features"),
    "bmm": ("batch", "rows", "inner", "columns"),
    "conv": ("batch", "in_channels", "out_channels", "height", "width", "groups"),
    "attention": ("batch", "heads", "kv_heads", "queries", "keys", "head"),
    "paged_attention": ("batch", "heads", "kv_heads", "queries", "keys", "head", "page_size"),
}
_COMPARISON = re.compile(r"\s*(==|!=|<=|>=|<|>|)\s*(\d{1,18})\s*")
_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "": int.__eq__, "==": int.__eq__, "!=": int.__ne__, "<": int.__lt__, "<=": int.__le__, ">": int.__gt__, ">=": int.__ge__,
}  # fmt: skip

Facts = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Rule:
    """`where`: names (any of them), kernels as globs, and sizes as comparisons (all of them). `factor` scales prices."""

    action: str
    name: str
    where: tuple[tuple[str, tuple[str, ...]], ...]
    factor: float

    def __str__(self) -> str:
        where = "; ".join(f"{k} {', '.join(texts)}" for k, texts in self.where)
        return f"{self.action} {self.name!r} ({where})"

    def holds(self, operations: Iterable[Facts]) -> bool:
        """Whether one of these operations meets the conditions (kernel and backend are no part of an operation)."""
        where = [(k, texts) for k, texts in self.where if k not in ("kernel", "backend")]
        return any(all(k in facts and _meets(facts[k], texts) for k, texts in where) for facts in operations)

    def names(self, kernel: str, backend: str) -> bool:
        where = dict(self.where)
        named = any(fnmatchcase(kernel, glob) for glob in where.get("kernel", ("*",)))
        return named and backend in where.get("backend", (backend,))


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules in the order in which they were given. Hashable: equal for files of equal content, wherever they lie."""

    rules: tuple[Rule, ...]

    def joined(self, other: Policy, origin: str) -> Policy:
        """These rules, and then the other's, which are named by where they come from; those that are here already, only once."""
        known = {replace(rule, name="") for rule in self.rules}
        fresh = [rule for rule in other.rules if replace(rule, name="") not in known]
        rules = (*self.rules, *(replace(rule, name=f"{rule.name} ({origin})"[-MAX_TEXT:]) for rule in fresh))
        if len(rules) > MAX_RULES or len({rule.name for rule in rules}) < len(rules):
            raise PolicyError(f"the policies of the code and of {origin} have together more than {MAX_RULES} rules, or two of one name.")
        return Policy(rules)

    def to_data(self) -> dict[str, list[dict[str, Any]]]:
        """As JSON has it; `load_policy` of it gives the same policy."""
        found: dict[str, list[dict[str, Any]]] = {}
        for rule in self.rules:
            where: dict[str, Any] = {k: list(v) if k in NAMES else ", ".join(v) for k, v in rule.where}
            factor = {} if rule.factor == FACTORS[rule.action] else {"factor": rule.factor}
            found.setdefault(rule.action, []).append({"name": rule.name, **where, **factor})
        return found

    def refusals(self, operations: Sequence[Facts], kernel: str, backend: str) -> tuple[Rule, ...]:
        """The rules that forbid a kernel to compute these operations."""
        strict = [r for r in self.rules if r.action in ("lock", "deny")]
        return tuple(r for r in strict if r.names(kernel, backend) is (r.action == "deny") and r.holds(operations))

    def weights(self, operations: Sequence[Facts], kernel: str, backend: str) -> tuple[Rule, ...]:
        """The rules that scale a kernel's price there."""
        soft = [r for r in self.rules if r.action in ("prefer", "avoid")]
        return tuple(r for r in soft if r.names(kernel, backend) and r.holds(operations))

    def check_names(self, kernels: Iterable[str], backends: Iterable[str]) -> None:
        """PolicyError for a rule that names a kernel or a backend which does not exist: it would silently do nothing."""
        kernels, backends = list(kernels), list(backends)
        for rule in self.rules:
            where = dict(rule.where)
            for glob in where.get("kernel", ()):
                if not any(fnmatchcase(kernel, glob) for kernel in kernels):
                    raise PolicyError(f"policy, rule {rule.name!r}: {unknown('kernel', glob, kernels)}")
            for backend in where.get("backend", ()):
                if backend not in backends:
                    raise PolicyError(f"policy, rule {rule.name!r}: {unknown('backend', backend, backends)}")


def facts(ctx: SelectionContext) -> Facts:
    """What conditions may ask of an operation. Sizes are those of the example where they vary."""
    op, p, first = ctx.region.op, ctx.params, ctx.specs[0]
    batch, *_ = q = first.shape
    match op:
        case "linear" | "gated_linear":
            sizes: tuple[int, ...] = (p["rows"], q[-1], p["width"])
        case "merged_linear":
            sizes = (p["rows"], q[-1], sum(p["widths"]), p["count"])
        case "bmm":
            sizes = (*q, ctx.specs[1].shape[-1])
        case "conv":
            sizes = (*q[:2], p["w_shape"][0], *q[2:], p["groups"])
        case "attention":
            heads, kv_heads = ((*(1, 1), *s.shape)[-3] for s in ctx.specs[:2])
            sizes = (batch, heads, kv_heads, p["queries"], p["keys"], q[-1])
        case "paged_attention":
            assert ctx.kv_cache is not None
            sizes = (batch, q[1], ctx.kv_cache.kv_heads, q[2], p["keys"], q[3], p["page_size"])
        case _:
            sizes = ()
    return {"op": op, "device": first.device, "dtype": first.dtype, **dict(zip(SIZES.get(op, ()), sizes, strict=True))}


def _meets(fact: str | int, texts: Sequence[str]) -> bool:
    if isinstance(fact, str):
        return fact in texts
    return all(_COMPARE[sign](fact, number) for sign, number in map(_comparison, texts))


@functools.lru_cache(1024)
def _comparison(text: str) -> tuple[str, int]:
    found = _COMPARISON.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return found[1], int(found[2])


# --- reading ------------------------------------------------------------------------------------------------------------


def load_policy(given: object, where: str) -> Policy:
    """A policy from a dict, from the path of a YAML or JSON file, or from such text itself if it begins with a brace. PolicyError, once
    and in words, for anything else."""
    if isinstance(given, Policy):
        return given
    if isinstance(given, str | os.PathLike) and str(given):
        text = os.fspath(given)
        inline = text.lstrip().startswith("{")
        where = f"{where} ({text[:MAX_TEXT]!r})"
        given = _parsed(text if inline else Path(os.path.expanduser(text)), where)
        if given is None:
            raise PolicyError(f"{where} is empty. Give a dict of {', '.join(FACTORS)} to lists of rules.")
    if not isinstance(given, Mapping):
        raise PolicyError(f"{where} is {reprlib.repr(given)}. Give a path, or a dict of {', '.join(FACTORS)} to lists of rules.")
    try:
        rules = [_rule(action, rule, i, where) for action, listed in given.items() for i, rule in enumerate(_listed(action, listed, where))]
    except PolicyError:
        raise
    except (ValueError, RecursionError) as error:  # what cannot even be shown: a number of thousands of digits
        raise PolicyError(f"{where} cannot be read as a policy: {error}.") from None
    names = [rule.name for rule in rules]
    if len(rules) > MAX_RULES or len(set(names)) < len(names):
        twice = next((n for n in names if names.count(n) > 1), None) if len(rules) <= MAX_RULES else None
        raise PolicyError(f"{where}: " + (f"two rules are named {twice!r}." if twice else f"more than {MAX_RULES} rules."))
    return Policy(tuple(rules))


def _parsed(source: Path | str, where: str) -> object:
    """The YAML or JSON in a file, or in a text."""
    import yaml

    try:
        data = source.encode() if isinstance(source, str) else read_limited(source, MAX_BYTES)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        text = data.decode()
        if isinstance(source, Path) and source.suffix == ".json":
            return json.loads(text, object_pairs_hook=lambda pairs: dict(pairs) if _once([k for k, _ in pairs]) else {})
        for keys in _mappings(yaml.compose(text, yaml.SafeLoader)):
            _once(keys)
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # The last four: PyYAML on text that is not what its tag says (`!!int ""`, `!!timestamp x`).
        reason = " ".join(str(error).split())[:MAX_TEXT]
        raise PolicyError(f"{where} cannot be read as a policy: {reason or type(error).__name__}. Give a YAML or JSON file.") from None


def _mappings(root: Any) -> Iterator[list[str]]:
    """The keys of every mapping in a YAML document, each visited once however often it is referred to."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        pairs = [item for item in node.value if isinstance(item, tuple)]
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in pairs):
            raise ValueError("merge keys (<<) are not read: a few lines of them stand for gigabytes")
        yield [str(key.value)[:MAX_TEXT] for key, _ in pairs]
        pending += [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]


def _once(keys: Sequence[str]) -> Sequence[str]:
    """A key given twice would silently drop the rules under the first."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{key[:MAX_TEXT]!r} is given twice")
        seen.add(key)
    return keys


def _listed(action: object, listed: object, where: str) -> Sequence[object]:
    if action not in FACTORS:
        raise PolicyError(f"{where}: {unknown('policy key', action, FACTORS)}")
    if not isinstance(listed, list | tuple):
        raise PolicyError(f"{where}: {action!r} is {reprlib.repr(listed)}. Give a list of rules.")
    return listed


@functools.cache
def _dtypes() -> frozenset[str]:
    """Torch's own names: an alias (`half`) is the dtype of no tensor."""
    import torch

    return frozenset(str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype))


def _rule(action: str, given: object, index: int, where: str) -> Rule:
    where = f"{where}, {action} rule {index + 1}"
    if not isinstance(given, Mapping):
        raise PolicyError(f"{where} is {reprlib.repr(given)}. Give a dict of conditions.")
    ops = _texts(given.get("op", ()), f"{where}, 'op'")
    for op in ops:
        if op not in SIZES:
            raise PolicyError(f"{where}: {unknown('op', op, SIZES)}")
    for condition, known in (("device", DEVICES), ("dtype", _dtypes() if "dtype" in given else ())):
        for value in _texts(given.get(condition, ()), f"{where}, {condition!r}"):
            if value not in known:
                raise PolicyError(f"{where}: {unknown(condition, value, known)}")
    sizes = {size for op in ops or SIZES for size in SIZES[op]}
    allowed = {*NAMES, *sizes, "name", *(["factor"] if action in ("prefer", "avoid") else [])}
    for key in given:
        if key not in allowed:
            raise PolicyError(f"{where}: {unknown('condition', str(key)[:MAX_TEXT], allowed)}")
    conditions = {k: _texts(v, f"{where}, {k!r}") if k in NAMES else _numbers(v, f"{where}, {k!r}") for k, v in given.items()
                  if k not in ("name", "factor")}  # fmt: skip
    if not conditions or (action == "lock" and not {"kernel", "backend"} & set(conditions)):
        raise PolicyError(f"{where} {'names no kernel or backend to lock to' if conditions else 'has no condition'}.")
    name = given.get("name", f"{action} {index + 1}")
    _texts([name], f"{where}, 'name'")
    factor = given.get("factor", FACTORS[action])
    low, high = {"prefer": (0.001, 1.0), "avoid": (1.0, 1000.0)}.get(action, (1.0, 1.0))
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not low <= factor <= high:
        raise PolicyError(f"{where}: 'factor' is {reprlib.repr(factor)}. Give a number from {low:g} to {high:g}.")
    return Rule(action, name, tuple(sorted(conditions.items())), float(factor))


def _texts(given: object, where: str) -> tuple[str, ...]:
    texts = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(t, str) and 0 < len(t) <= MAX_TEXT and t.isprintable() for t in texts) or len(texts) > MAX_RULES:
        raise PolicyError(f"{where} is {reprlib.repr(given)}. Give a name or a list of names.")
    return texts  # type: ignore[return-value]


def _numbers(given: object, where: str) -> tuple[str, ...]:
    """Comparisons in their normal form: `>= 128, < 4096` and 64 are ('>=128', '<4096') and ('==64',)."""
    texts = given.split(",") if isinstance(given, str) and len(given) <= MAX_TEXT else []
    texts = [str(given)] if type(given) is int and 0 <= given < 10**18 else texts
    found = [_COMPARISON.fullmatch(text) for text in texts]
    if not found or None in found:
        raise PolicyError(f"{where} is {reprlib.repr(given)}. Give a whole number, or comparisons such as '>= 128, < 4096'.")
    return tuple(f"{m[1] or '=='}{int(m[2])}" for m in found if m is not None)
