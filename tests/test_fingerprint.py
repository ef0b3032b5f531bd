"""Real folders, real clocks. A cached answer must be quick and never a wrong one."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import lz_compiler
from lz_compiler.cli import app, main
from lz_compiler.deploy.model_fingerprint import GRAIN_NS, KIND, Fingerprint, differences, fingerprint
from lz_compiler.errors import FingerprintError
from lz_compiler.timings import TimingStore, open_store

Contents = dict[str, Any]

# Tokens as a byte-pair tokenizer has them: no white space of ASCII, but any other separator that Unicode knows.
tokens = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=" \n\r"), min_size=1, max_size=6)
vocabularies = st.lists(tokens, min_size=3, max_size=12, unique=True)


def contents(words: list[str]) -> Contents:
    """A model folder: file name -> what is written there (JSON, or bytes)."""
    added = [
        {"id": 90, "content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False},
        {"id": 91, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True},
    ]
    merges = [[a, b] for a in words[:3] for b in words[:3]]
    model = {"type": "BPE", "unk_token": None, "vocab": {word: index for index, word in enumerate(words)}, "merges": merges}
    return {
        "tokenizer.json": {
            "version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "ByteLevel", "trim": True},
            "post_processor": None, "decoder": {"type": "ByteLevel"}, "model": model,
        },
        "tokenizer_config.json": {"eos_token": "</s>", "add_bos_token": False, "chat_template": "{{ x }}", "model_max_length": 1000},
        "special_tokens_map.json": {"eos_token": "</s>"},
        "config.json": {"model_type": "llama", "hidden_size": 64, "rope": {"theta": 1e4, "type": "plain"}, "text_config": {}},
        "generation_config.json": {"do_sample": False, "eos_token_id": 91},
        "model.safetensors": b"0123456789" * 100,
    }  # fmt: skip


def write(folder: Path, files: Contents, shuffle: random.Random | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name in {entry.name for entry in folder.iterdir()} - files.keys():
        (folder / name).unlink()
    for name, value in files.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif shuffle is None:
            (folder / name).write_text(json.dumps(value))
        else:
            text = json.dumps(shuffled(value, shuffle), indent=shuffle.choice([None, 0, 3]), ensure_ascii=shuffle.random() < 0.5)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def shuffled(value: Any, by: random.Random) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key], by) for key in by.sample(sorted(value), len(value))}
    return [shuffled(item, by) for item in value] if isinstance(value, list) else value


def store_of(cache: str) -> TimingStore:
    return open_store(cache)


def edit_record(cache: str, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = store_of(cache).get_record(KIND, json.dumps(str(folder)))
    assert record is not None
    change(record)
    store_of(cache).put_record(KIND, json.dumps(str(folder)), record)


def age(record: dict[str, Any], by: int = 10 * GRAIN_NS) -> None:
    """As if the files had been long unchanged when they were hashed."""
    for file in record["files"].values():
        file[1] += by


def claim(record: dict[str, Any]) -> None:
    """Another answer in the record: who gives it has believed the record."""
    record["fingerprint"]["config"]["config.json"] = "c" * 32


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", contents(["a", "b", "ab"]))


# --- meaning ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(vocabularies, st.randoms(use_true_random=False))
def test_writing_json_otherwise_changes_nothing(tmp_path_factory: pytest.TempPathFactory, words: list[str], by: random.Random) -> None:
    base = tmp_path_factory.mktemp("equal")
    files, cache = contents(words), str(base / "cache")
    first = fingerprint(write(base / "model", files), cache)
    files["config.json"]["transformers_version"] = "9.9"  # who wrote it, not what it is
    files["config.json"]["text_config"] |= {"_name_or_path": "/elsewhere", "transformers_version": "9.9"}
    files["tokenizer.json"]["model"]["merges"] = [" ".join(pair) for pair in files["tokenizer.json"]["model"]["merges"]]
    second = fingerprint(write(base / "model", files, by), cache)
    assert differences(first, second) == []
    assert first == second
    assert Fingerprint.from_dict(json.loads(json.dumps(first.to_dict()))) == first


def _flip_special(files: Contents) -> None:
    files["tokenizer.json"]["added_tokens"][0]["special"] = True


def _swap_merges(files: Contents) -> None:
    merges = files["tokenizer.json"]["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _swap_ids(files: Contents) -> None:
    vocab = files["tokenizer.json"]["model"]["vocab"]
    one, two = list(vocab)[:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]


CHANGES: list[tuple[Callable[[Contents], object], list[str]]] = [
    (_swap_ids, ["tokenizer: vocabulary"]),
    (lambda files: files["tokenizer.json"]["model"]["vocab"].update({"longer than six": 77}), ["tokenizer: vocabulary"]),
    (_swap_merges, ["tokenizer: merges"]),
    (lambda files: files["tokenizer.json"]["model"]["merges"].clear(), ["tokenizer: merges (only in the first)"]),
    (lambda files: files["tokenizer.json"]["model"].update(unk_token="a"), ["tokenizer: model"]),
    (lambda files: files["tokenizer.json"]["added_tokens"][0].update(lstrip=True), ["tokenizer: added tokens"]),
    (lambda files: files["tokenizer.json"]["added_tokens"][1].update(content="<e>"), ["tokenizer: special tokens"]),
    (_flip_special, ["tokenizer: added tokens (only in the first)", "tokenizer: special tokens"]),
    (lambda files: files["tokenizer_config.json"].update(pad_token="</s>"), ["tokenizer: special tokens"]),
    (lambda files: files["special_tokens_map.json"].update(eos_token="<e>"), ["tokenizer: special tokens"]),
    (lambda files: files["tokenizer.json"].update(normalizer={"type": "NFKC"}), ["tokenizer: normaliser"]),
    (lambda files: files["tokenizer.json"].update(normalizer=None), ["tokenizer: normaliser (only in the first)"]),
    (lambda files: files["tokenizer.json"]["pre_tokenizer"].update(trim=False), ["tokenizer: pre-tokenizer"]),
    (lambda files: files["tokenizer.json"].update(post_processor={"type": "x"}), ["tokenizer: post-processor (only in the second)"]),
    (lambda files: files["tokenizer_config.json"].update(add_bos_token=True), ["tokenizer: settings"]),
    (lambda files: files["tokenizer_config.json"].update(chat_template="{{ y }}"), ["tokenizer: chat template"]),
    (lambda files: files["config.json"]["rope"].update(theta=1e5), ["config: config.json"]),
    (lambda files: files.pop("generation_config.json"), ["config: generation_config.json (only in the first)"]),
    (lambda files: files.update({"model.safetensors": b"0123456780" * 100}), ["weights: model.safetensors"]),
    (lambda files: files.update({"m.bin": b"1"}), ["weights: m.bin (only in the second)"]),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(vocabularies, st.sampled_from(CHANGES), st.randoms(use_true_random=False))
def test_one_change_is_named(tmp_path_factory: pytest.TempPathFactory, words: list[str], change: Any, by: random.Random) -> None:
    """Also that nothing stale is answered: both are the same folder, within the clock's grain."""
    base = tmp_path_factory.mktemp("change")
    files, cache = contents(words), str(base / "cache")
    first = fingerprint(write(base / "model", files), cache)
    changed = copy.deepcopy(files)
    change[0](changed)
    second = fingerprint(write(base / "model", changed, by), cache)
    assert differences(first, second) == change[1]
    groups = {name for name in first.digests() if first.digests()[name] != second.digests()[name]}
    assert groups == {text.split(":")[0] for text in change[1]}


@settings(max_examples=40, deadline=None)
@given(vocabularies)
def test_older_files_give_the_same_vocabulary_and_merges(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    base = tmp_path_factory.mktemp("forms")
    files, cache = contents(words), str(base / "cache")
    fast = dict(fingerprint(write(base / "fast", files), cache).tokenizer)
    whole = files.pop("tokenizer.json")
    merges = [f"{a} {b}\n" for a, b in whole["model"]["merges"]]
    pairs = {"vocab.json": whole["model"]["vocab"], "merges.txt": "".join(["#version: 0.2\n", *merges]).encode()}
    decoder = {str(token.pop("id")): token for token in whole["added_tokens"]}
    files["tokenizer_config.json"]["added_tokens_decoder"] = decoder
    files["tokenizer_config.json"].pop("chat_template")
    files |= {"chat_template.jinja": b"{{ x }}", "added_tokens.json": {"<tool>": 90}}
    slow = dict(fingerprint(write(base / "slow", files | pairs), cache).tokenizer)
    assert slow.items() <= fast.items()
    assert fast.keys() - slow.keys() == {"normaliser", "pre-tokenizer", "decoder", "model"}
    bert = fingerprint(write(base / "bert", files | {"vocab.txt": "\n".join([*words, ""]).encode()}), cache)
    assert dict(bert.tokenizer)["vocabulary"] == fast["vocabulary"]
    piece = [dict(fingerprint(write(base / "piece", files | {"spiece.model": b}), cache).tokenizer) for b in (b"\n\1a", b"\n\1b")]
    assert piece[0].keys() == piece[1].keys()
    assert {part for part in piece[0] if piece[0][part] != piece[1][part]} == {"model file"}


@pytest.mark.parametrize("beside", ["vocab.json", "vocab.txt", "config.json"])
@pytest.mark.parametrize("name", ["sentencepiece.model", "source.spm"])
def test_another_model_file_is_a_difference(beside: str, name: str, tmp_path: Path, cache: str) -> None:
    one, two = (fingerprint(write(tmp_path / "m", {beside: {"a": 1}, name: b}), cache) for b in (b"one", b"two"))
    assert differences(one, two) == ["tokenizer: model file"]


def test_saved_again_by_transformers(tmp_path: Path, cache: str) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    core.normalizer, core.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", additional_special_tokens=["<x>"], chat_template="{{ x }}")
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for saved in (made, LlamaConfig(hidden_size=64)):
        saved.save_pretrained(first)
    loaded = AutoTokenizer.from_pretrained(first)
    for saved in (loaded, AutoConfig.from_pretrained(first)):
        saved.save_pretrained(again)
    assert differences(fingerprint(first, cache), fingerprint(again, cache)) == []
    loaded.add_tokens(["<tool>"])
    loaded.backend_tokenizer.normalizer = normalizers.NFKC()
    loaded.save_pretrained(other)
    found = differences(fingerprint(again, cache), fingerprint(other, cache))
    assert found == ["tokenizer: added tokens (only in the second)", "tokenizer: normaliser", "config: config.json (only in the first)"]


# --- the cache ----------------------------------------------------------------------------------------------------------------


def test_a_proved_record_is_the_answer(model: Path, cache: str) -> None:
    first = fingerprint(model, cache)
    edit_record(cache, model, claim)
    assert fingerprint(model, cache).config != first.config  # equal bytes: nothing was parsed again
    edit_record(cache, model, age)
    assert dict(fingerprint(model, cache).config)["config.json"] == "c" * 32
    assert fingerprint(model, f"{cache}2") == first
    store_of(cache).clear(KIND)
    assert fingerprint(model, cache) == first


def test_touched_files_keep_the_fingerprint(model: Path, cache: str) -> None:
    first = fingerprint(model, cache)
    edit_record(cache, model, age)
    for name in ("tokenizer.json", "model.safetensors"):
        os.utime(model / name)
        assert fingerprint(model, cache) == first
    replaced = (model / "config.json").read_bytes()
    (model / "new").write_bytes(replaced)
    os.replace(model / "new", model / "config.json")
    assert fingerprint(model, cache) == first


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_same_size_edits_within_a_tick(name: str, model: Path, cache: str) -> None:
    old, new = (model / name).read_bytes(), (model / name).read_bytes()
    place = new.rindex(b"1")
    new = new[:place] + b"2" + new[place + 1 :]
    answers = []
    for content in [old, new] * 30:
        with open(model / name, "r+b") as file:
            file.write(content)
        answers.append(fingerprint(model, cache))
    assert len(set(answers)) == 2
    assert answers == answers[:2] * 30


def test_an_edit_that_leaves_no_trace_in_the_stamps(model: Path, cache: str) -> None:
    """A clock of coarse grain, whatever this machine's is: the record gets the stamps of the edited file."""
    first = fingerprint(model, cache)
    config = model / "config.json"
    config.write_text(config.read_text().replace("64", "65"))
    found = config.stat()

    def stamp(record: dict[str, Any]) -> None:
        record["files"]["config.json"][0] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]

    edit_record(cache, model, stamp)
    edit_record(cache, model, age)
    assert fingerprint(model, cache) == first  # long unchanged when hashed: believed, so the stamps are the only witness
    for late in (0, GRAIN_NS - 1):

        def hashed(record: dict[str, Any], late: int = late) -> None:
            record["files"]["config.json"][1] = max(found.st_mtime_ns, found.st_ctime_ns) + late

        edit_record(cache, model, hashed)
        before = store_of(cache).get_record(KIND, json.dumps(str(model)))
        assert differences(first, fingerprint(model, cache)) == ["config: config.json"]
        store_of(cache).put_record(KIND, json.dumps(str(model)), before or {})


def test_mtime_set_back_after_an_edit(model: Path, cache: str) -> None:
    config = model / "config.json"
    os.utime(config, ns=(10**18, 10**18))
    first = fingerprint(model, cache)
    edit_record(cache, model, age)
    config.write_text(config.read_text().replace("64", "65"))
    os.utime(config, ns=(10**18, 10**18))
    assert differences(first, fingerprint(model, cache)) == ["config: config.json"]


def test_weights_that_are_unchanged_are_not_read_again(model: Path, cache: str) -> None:
    fingerprint(model, cache)

    def known(record: dict[str, Any]) -> None:
        age(record)
        record["files"]["model.safetensors"][2] = "e" * 32

    edit_record(cache, model, known)
    (model / "config.json").write_text("{}")
    assert fingerprint(model, cache).weights == (("model.safetensors", "e" * 32),)


def test_files_that_come_and_go(model: Path, cache: str) -> None:
    first = fingerprint(model, cache)
    edit_record(cache, model, age)
    (model / "generation_config.json").rename(model / "kept")
    assert differences(first, fingerprint(model, cache)) == ["config: generation_config.json (only in the first)"]
    edit_record(cache, model, age)
    (model / "kept").rename(model / "generation_config.json")
    assert fingerprint(model, cache) == first


def test_links_as_in_a_download_cache(model: Path, cache: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in os.listdir(model):
        (snapshot / name).symlink_to(Path("..") / "model" / name)
    assert fingerprint(snapshot, cache) == fingerprint(model, cache)
    edit_record(cache, snapshot, age)
    (tmp_path / "other").write_text((model / "config.json").read_text().replace("64", "65"))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "other")
    assert differences(fingerprint(model, cache), fingerprint(snapshot, cache)) == ["config: config.json"]
    (tmp_path / "other").unlink()
    with pytest.raises(FingerprintError, match=r"cannot read .*config\.json: No such file"):
        fingerprint(snapshot, cache)


@pytest.mark.parametrize("record", [{}, {"files": 3}, {"files": {"config.json": [1]}}, {"files": {}, "fingerprint": {"schema_version": 0}}])
def test_a_damaged_record_is_none(record: dict[str, Any], model: Path, cache: str) -> None:
    first = fingerprint(model, cache)
    store_of(cache).put_record(KIND, json.dumps(str(model)), record)
    assert fingerprint(model, cache) == first


def test_processes_at_once_and_without_torch(model: Path, cache: str) -> None:
    code = (
        "import sys, json, lz_compiler as lz; print(json.dumps(lz.fingerprint(*sys.argv[1:]).to_dict())); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(model), cache]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    done = [process.communicate(timeout=60) for process in running]
    assert [(process.returncode, error) for process, (_, error) in zip(running, done, strict=True)] == [(0, "")] * 3
    found = fingerprint(model, cache)
    assert [Fingerprint.from_dict(json.loads(text)) for text, _ in done] == [found] * 3


# --- the command, and mistakes ------------------------------------------------------------------------------------------------


def test_command(model: Path, cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = lz_compiler.fingerprint(str(model), cache)
    as_json = CliRunner().invoke(app, ["fingerprint", str(model), "--json", "--cache-dir", cache])
    assert Fingerprint.from_dict(json.loads(as_json.stdout)) == found
    text = CliRunner().invoke(app, ["fingerprint", str(model), "--cache-dir", cache]).stdout
    for group, digest in found.digests().items():
        assert f"{digest}  {group}\n" in text
    for part, digest in (*found.tokenizer, *found.config, *found.weights):
        assert f"  {digest}  {part}\n" in text
    monkeypatch.setattr(sys, "argv", ["lz", "fingerprint", str(model / "nowhere")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "nowhere is not a folder. Give the folder of a model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"a": 1,\n "b" 2}', r"config\.json: broken JSON at line 2, column 6 .*Download the file again"),
        ("config.json", b'{"a": "\xff"}', r"config\.json: not UTF-8 at byte 7"),
        ("config.json", b"[" * 100_000, r"config\.json: broken JSON"),
        ("config.json", b"[]", r"config\.json: the file is list, not dict"),
        ("tokenizer.json", b"", r"tokenizer\.json: broken JSON at line 1, column 1"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: 'model' is NoneType, not dict"),
        ("tokenizer.json", b'{"model": {"vocab": 3}}', r"tokenizer\.json: 'vocab' is int, not dict or list"),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": 3}]}', r"tokenizer\.json: .*not an added token"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', r"tokenizer_config\.json: .*not an added token"),
    ],
)
def test_broken_files(name: str, content: bytes, message: str, model: Path, cache: str) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(FingerprintError, match=message):
        fingerprint(model, cache)


def test_wrong_folders(model: Path, cache: str, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match="is not a folder"):
        fingerprint(model / "config.json", cache)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").touch()
    with pytest.raises(FingerprintError, match="3 is not a folder"):
        fingerprint(3)  # type: ignore[arg-type]
    with pytest.raises(FingerprintError, match="has no tokenizer, config or weights"):
        fingerprint(empty, cache)
    os.mkfifo(empty / "config.json")  # would be read for ever
    with pytest.raises(FingerprintError, match="is not a regular file"):
        fingerprint(empty, cache)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that not even root can read")
def test_a_file_that_cannot_be_read(model: Path, cache: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/proc/self/mem")  # a regular file whose first byte is not mapped
    with pytest.raises(FingerprintError, match=r"cannot read .*model\.safetensors: Input/output error"):
        fingerprint(model, cache)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a JSON object, not list"),
        ({}, "schema version None; this LayerZero reads 2"),
        ({"schema_version": 1}, "schema version 1"),
        ({"schema_version": 2, "config": {}, "weights": {}}, "'tokenizer' must map names to hashes"),
        ({"schema_version": 2, "tokenizer": {"merges": "0x1"}, "config": {}, "weights": {}}, "'tokenizer' must map"),
    ],
)
def test_broken_fingerprints(data: object, message: str) -> None:
    with pytest.raises(FingerprintError, match=message):
        Fingerprint.from_dict(data)
