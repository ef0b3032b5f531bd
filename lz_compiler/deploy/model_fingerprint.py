"""What a Hugging Face model folder holds, as hashes: tokenizer, config, weights. Two folders of one fingerprint serve alike.

JSON is hashed by meaning (key order, white space and escapes do not count), the tokenizer part by part, so that a difference
has a name. Weights are hashed as bytes, file by file. Hashes are xxh3_128: they find mistakes, not forgery.

A folder's result is kept with each file's stat and the time at which it was hashed. A stat proves that content is unchanged only
if it was already old by then: an edit within the clock's grain leaves every stamp as it was. (As git does with entries of its
index that are "racily clean".) ctime is looked at beside mtime because it cannot be set back. Nothing but a write through a
memory map that is already dirty escapes: it moves no stamp.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..errors import FingerprintError, PlanError
from ..timings import TimingStore, user_store

SCHEMA_VERSION = 2
KIND = "fingerprint"
GROUPS = ("tokenizer", "config", "weights")
GRAIN_NS = 3_000_000_000  # two seconds on FAT, the coarsest stamps there are, and one for a file server's own clock
_BLOCK = 1 << 22

_TOKENIZER = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|vocab\.txt"
    r"|chat_template\.jinja|tekken\.json|.+\.(model|spm|tiktoken)"
)
_CONFIG = re.compile(r"config\.json|generation_config\.json")
_WEIGHTS = re.compile(r".+\.(safetensors|bin)(\.index\.json)?")
_PATTERNS = dict(zip(GROUPS, (_TOKENIZER, _CONFIG, _WEIGHTS), strict=True))

# Where a folder came from and what wrote it, not what it does.
_ORIGIN = {
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "tokenizer_file", "special_tokens_map_file", "is_local",
    "local_files_only",
}  # fmt: skip
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_PIPELINE = {
    "normaliser": "normalizer", "pre-tokenizer": "pre_tokenizer", "post-processor": "post_processor", "decoder": "decoder",
    "truncation": "truncation", "padding": "padding",
}  # fmt: skip

_Parts = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """(name, hash) pairs, sorted by name: of the tokenizer's parts, of the config's files, and of the weights' files."""

    tokenizer: _Parts
    config: _Parts
    weights: _Parts

    def digests(self) -> dict[str, str]:
        """One hash for each group; an absent group has that of an empty one."""
        return {group: _digest(getattr(self, group)) for group in GROUPS}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `schema_version`, and name -> hash for each group."""
        return {"schema_version": SCHEMA_VERSION, **{group: dict(getattr(self, group)) for group in GROUPS}}

    @staticmethod
    def from_dict(data: object) -> Fingerprint:
        """The inverse of `to_dict`. FingerprintError for anything else."""
        if not isinstance(data, Mapping):
            raise FingerprintError(f"a fingerprint is a JSON object, not {type(data).__name__}. {_AGAIN}")
        if data.get("schema_version") != SCHEMA_VERSION:
            given = data.get("schema_version")
            raise FingerprintError(f"a fingerprint of schema version {given!r}; this LayerZero reads {SCHEMA_VERSION}. {_AGAIN}")
        return Fingerprint(*(_parts_from(data.get(group), group) for group in GROUPS))


_AGAIN = "Make it again with `lz fingerprint DIR --json`."


def _parts_from(given: object, group: str) -> _Parts:
    if isinstance(given, Mapping) and all(
        isinstance(name, str) and isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) for name, value in given.items()
    ):
        return tuple(sorted(given.items()))
    raise FingerprintError(f"a fingerprint's {group!r} must map names to hashes of 32 hexadecimal digits. {_AGAIN}")


def differences(a: Fingerprint, b: Fingerprint) -> list[str]:
    """What differs, as "GROUP: PART"; empty for equal fingerprints. A part that one of them lacks says which one has it."""
    found = []
    for group in GROUPS:
        one, two = dict(getattr(a, group)), dict(getattr(b, group))
        for part in sorted(one.keys() | two.keys()):
            if one.get(part) != two.get(part):
                where = " (only in the second)" if part not in one else " (only in the first)" if part not in two else ""
                found.append(f"{group}: {part}{where}")
    return found


def fingerprint(dir: str | os.PathLike[str], cache_dir: str | None = None) -> Fingerprint:
    """The fingerprint of a model folder: of the tokenizer's, config's and weights' files directly in it.

    The vocabulary is that of tokenizer.json, else vocab.json with merges.txt, else vocab.txt, with the tokenizer's model files.
    `cache_dir` is the folder of the timings store (by default option `cache_dir`). FingerprintError if a file cannot be read.
    """
    if not isinstance(dir, str | os.PathLike):
        raise FingerprintError(f"{dir!r:.80} is not a folder. Give the path of a model's folder, with its config.json.")
    folder = Path(os.path.abspath(os.path.expanduser(dir)))
    stats = _listed(folder)
    store = user_store(cache_dir)
    key = json.dumps(str(folder))  # ASCII, whatever bytes the path has
    known, last = _recall(store, key)
    if last is not None and known.keys() == stats.keys() and all(known[name].proves(found) for name, found in stats.items()):
        return last
    seen, contents = {}, {}
    for name, found in stats.items():
        if _WEIGHTS.fullmatch(name) and not name.endswith(".json"):
            old = known.get(name)
            seen[name] = old if old is not None and old.proves(found) else _read(folder / name)[0]
        else:  # small; and read now, since a proof is of no use once the file must be parsed
            seen[name], contents[name] = _read(folder / name, keep=True)
    made = last if last is not None and _hashes(known) == _hashes(seen) else _made(folder, contents, seen)
    files = {name: [list(file.stat), file.hashed_ns, file.digest] for name, file in seen.items()}
    store.put_record(KIND, key, {"files": files, "fingerprint": made.to_dict()})
    return made


# --- files ------------------------------------------------------------------------------------------------------------------


_Stat = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One file's bytes: their hash, the file's stat, and the time just before they were read."""

    stat: _Stat
    hashed_ns: int
    digest: str

    def proves(self, stat: _Stat) -> bool:
        """Whether a file of this stat has these bytes still."""
        return self.stat == stat and self.hashed_ns - max(stat[1:3]) > GRAIN_NS


def _stat_of(found: os.stat_result) -> _Stat:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def _listed(folder: Path) -> dict[str, _Stat]:
    """The files that count, sorted by name. Links are followed: a download cache is made of them."""
    stats = {}
    try:
        for name in sorted(os.listdir(folder)):
            if any(pattern.fullmatch(name) for pattern in _PATTERNS.values()):
                found = os.stat(folder / name)
                if not stat.S_ISREG(found.st_mode):
                    raise FingerprintError(f"{folder / name} is not a regular file. Move it out of the model folder.")
                stats[name] = _stat_of(found)
    except OSError as error:
        if isinstance(error, NotADirectoryError) or not folder.exists():
            raise FingerprintError(f"{folder} is not a folder. Give the folder of a model, with its config.json.") from error
        raise _unreadable(folder, error) from error
    if not stats:
        raise FingerprintError(
            f"{folder} has no tokenizer, config or weights (tokenizer.json, config.json, *.safetensors, ...). "
            "Give the folder into which a Hugging Face model was saved; from a download cache, the one under snapshots/."
        )
    return stats


def _unreadable(path: Path, error: OSError) -> FingerprintError:
    return FingerprintError(f"cannot read {error.filename or path}: {error.strerror}. Make it readable, or download it again.")


def _read(path: Path, keep: bool = False) -> tuple[_Seen, bytes]:
    """What a file is now, and its bytes if they are to be kept. The clock first: what is changed while it is read is younger."""
    now = time.time_ns()
    digest, content = xxhash.xxh3_128(), b""
    try:
        with open(path, "rb", buffering=0) as file:
            found = _stat_of(os.fstat(file.fileno()))
            if keep:
                content = file.readall()
                digest.update(content)
            else:
                block = memoryview(bytearray(min(_BLOCK, found[0] + 1)))
                while count := file.readinto(block):
                    digest.update(block[:count])
    except OSError as error:
        raise _unreadable(path, error) from error
    return _Seen(found, now, digest.hexdigest()), content


def _recall(store: TimingStore, key: str) -> tuple[dict[str, _Seen], Fingerprint | None]:
    """What is stored of a folder; nothing if it is damaged or of another version."""
    record = store.get_record(KIND, key)
    if record is None:
        return {}, None
    try:
        files = {name: _Seen(tuple(map(int, was)), int(at), str(digest)) for name, (was, at, digest) in record["files"].items()}
        return files, Fingerprint.from_dict(record["fingerprint"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}, None


def _hashes(files: Mapping[str, _Seen]) -> dict[str, str]:
    return {name: file.digest for name, file in files.items()}


# --- meaning ----------------------------------------------------------------------------------------------------------------


def _made(folder: Path, contents: Mapping[str, bytes], seen: Mapping[str, _Seen]) -> Fingerprint:
    files = _Files(folder, contents)
    parts = _tokenizer_parts(files)
    tokenizer = {name: _digest(value) for name, value in parts.items() if value not in (None, [], {}, "")}
    weights, config = {}, {}
    for name in seen:
        if _WEIGHTS.fullmatch(name):
            weights[name] = _digest(files.object(name)) if name.endswith(".json") else seen[name].digest
        elif _CONFIG.fullmatch(name):
            config[name] = _digest(files.object(name, _ORIGIN))
    return Fingerprint(*(tuple(sorted(group.items())) for group in (tokenizer, config, weights)))


def _digest(value: object) -> str:
    # Escaped to ASCII, so that a lone surrogate is no error; sorted, so that the order of keys is none of its meaning.
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True, slots=True)
class _Files:
    """The small files, parsed on demand; every error names the file, and the place in it."""

    folder: Path
    contents: Mapping[str, bytes]

    def wrong(self, name: str, why: str) -> FingerprintError:
        return FingerprintError(f"{self.folder / name}: {why}. Download the file again, or repair it.")

    def object(self, name: str, without: Collection[str] = ()) -> dict[str, Any]:
        """A file's JSON object, in which no object has the names `without`; an empty one if the file is not there."""
        if name not in self.contents:
            return {}
        try:
            value = json.loads(self.contents[name], object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k not in without})
        except json.JSONDecodeError as error:
            raise self.wrong(name, f"broken JSON at line {error.lineno}, column {error.colno} ({error.msg})") from error
        except UnicodeDecodeError as error:
            raise self.wrong(name, f"not UTF-8 at byte {error.start}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting
            raise self.wrong(name, f"broken JSON ({error})") from error
        return self.expect(name, "the file", value, dict)

    def lines(self, name: str) -> list[str]:
        try:
            text = self.contents[name].decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise self.wrong(name, f"not UTF-8 at byte {error.start}") from error
        return text.removesuffix("\n").split("\n")  # not splitlines: a token may be one of Unicode's separators

    def expect(self, name: str, what: str, value: Any, *kinds: type) -> Any:
        if not isinstance(value, kinds):
            raise self.wrong(name, f"{what} is {type(value).__name__}, not {' or '.join(kind.__name__ for kind in kinds)}")
        return value


def _tokenizer_parts(files: _Files) -> dict[str, Any]:
    """The tokenizer by the names of its parts, in a form in which equal meaning is equal JSON."""
    fast = files.object("tokenizer.json")
    config = files.object("tokenizer_config.json", _ORIGIN)
    known = _known_tokens(files, fast.get("added_tokens") or [], config.pop("added_tokens_decoder", {}))
    template = config.pop("chat_template", None)
    if "chat_template.jinja" in files.contents:
        template = "\n".join(files.lines("chat_template.jinja"))
    settings, roles = _roles(config, files.object("special_tokens_map.json"))
    return {
        **(_fast_parts(files, fast) if "tokenizer.json" in files.contents else _slow_parts(files)),
        "added tokens": [token for token in known if not token["special"]],
        "special tokens": [value for value in ([token for token in known if token["special"]], roles) if value],
        "chat template": template,
        "settings": settings,
    }


def _fast_parts(files: _Files, fast: Mapping[str, Any]) -> dict[str, Any]:
    """Of tokenizer.json: vocabulary (token -> id, or tokens and scores in order of ids), merges (pairs, first to last), pipeline."""
    model = dict(files.expect("tokenizer.json", "'model'", fast.get("model"), dict))
    vocabulary = files.expect("tokenizer.json", "'vocab'", model.pop("vocab", None), dict, list)
    merges = files.expect("tokenizer.json", "'merges'", model.pop("merges", None) or [], list)
    stages = {part: fast.get(key) for part, key in _PIPELINE.items()}
    return {"vocabulary": vocabulary, "merges": [_pair(merge) for merge in merges], "model": model, **stages}


def _slow_parts(files: _Files) -> dict[str, Any]:
    """Of the older files: the same vocabulary and merges, and a hash for each model file, which may hold all of it, or only how text
    is split beside a vocab.json."""
    names = files.contents
    others = [name for name in names if name == "tekken.json" or name.endswith((".model", ".spm", ".tiktoken"))]
    found: dict[str, Any] = {"model file": {name: xxhash.xxh3_128_hexdigest(names[name]) for name in others}}
    if "vocab.json" in names:
        lines = files.lines("merges.txt") if "merges.txt" in names else []
        merges = [_pair(x) for x in lines if x and not x.startswith("#version")]
        return {"vocabulary": files.object("vocab.json"), "merges": merges, **found}
    if "vocab.txt" in names:
        found["vocabulary"] = {token: index for index, token in enumerate(files.lines("vocab.txt"))}
    return found


def _pair(merge: object) -> object:
    """A merge as a pair; the older form is both tokens with a space between."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _known_tokens(files: _Files, listed: Any, decoder: Any) -> list[dict[str, Any]]:
    """Added tokens, each once, whichever of the files tell of it. One without flags says nothing new of a known token."""
    found = [("tokenizer.json", token) for token in files.expect("tokenizer.json", "'added_tokens'", listed, list)]
    for index, token in files.expect("tokenizer_config.json", "'added_tokens_decoder'", decoder, dict).items():
        found.append(("tokenizer_config.json", {**files.expect("tokenizer_config.json", repr(index), token, dict), "id": index}))
    tokens: dict[str, dict[str, Any]] = {}
    for name, token in found:
        try:
            special = bool(token.get("special"))
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
            full = {**flags, **token, "special": special, "id": int(token["id"]), "content": token["content"]}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise files.wrong(name, f"{token!r} is not an added token: it needs an 'id' and 'content'") from error
        tokens[json.dumps(full, sort_keys=True)] = full
    plain = [(token["id"], token["content"]) for token in tokens.values()]
    for content, index in files.object("added_tokens.json").items():
        if (index, content) not in plain:
            tokens[json.dumps([index, content])] = {"id": index, "content": content, "special": False}
    return [tokens[text] for text in sorted(tokens)]


def _roles(config: Mapping[str, Any], special: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The config's settings, and which token begins, ends, pads...: what either file says, each value once."""
    settings: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, value in (*config.items(), *special.items()):
        if name not in _TOKEN_LISTS and not (name.endswith("_token") and isinstance(value, str | dict | None)):
            settings[name] = value  # `add_bos_token` is one
        elif value:
            found.setdefault(name, {})[json.dumps(value, sort_keys=True)] = value
    return settings, {name: [values[text] for text in sorted(values)] for name, values in found.items()}


def check_bundle(planned: Mapping[str, str], folder: str | os.PathLike[str] | None, strict: bool) -> None:
    """Whether a model's folder has the tokenizer and config that a plan was solved with: else PlanError, or a warning if not strict."""
    if folder is None:
        return
    if not planned:
        raise PlanError("the plan was solved without bundle=...: there is nothing to compare the folder with. Solve again with it.")
    found = fingerprint(folder).digests()
    other = [group for group in ("tokenizer", "config") if found[group] != planned.get(group)]
    if other and strict:
        raise PlanError(f"{os.fspath(folder)!r} has another {' and '.join(other)} than the plan was solved with. Solve again.")
    if other:
        warnings.warn(f"LayerZero: {os.fspath(folder)!r} has another {' and '.join(other)} than the plan was solved with", stacklevel=4)
