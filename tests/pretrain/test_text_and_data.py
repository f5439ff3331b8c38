"""From files to tokens: which text is chosen, and what the cache holds."""

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycomm.pretrain import ConfigError, DataConfig
from pycomm.pretrain.data import DOCUMENT_START, held_out_start, prepare
from pycomm.pretrain.text import STDLIB_LEFT_OUT, select_text
from tests.pretrain.helpers import MODEL, small_config


def write_files(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}\n")


def test_order_does_not_depend_on_how_files_were_created(tmp_path: Path) -> None:
    names = [f"{letter}/{number}.txt" for letter in "abc" for number in range(5)]
    write_files(tmp_path / "one", names)
    write_files(tmp_path / "two", names[::-1])
    one, two = select_text([tmp_path / "one"], 0), select_text([tmp_path / "two"], 0)
    assert one.documents == two.documents
    assert one.digest() == two.digest()
    assert sorted(one.documents) == sorted(f"this is {name}\n" for name in names)
    assert list(one.documents) != sorted(one.documents)


def test_what_is_no_text_is_skipped_and_counted(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.txt", ".hidden", ".git/config"])
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "zeros.bin").write_bytes(b"\0\0\0")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    selection = select_text([tmp_path], 0)
    assert selection.documents == ("this is a.txt\n",)
    assert selection.num_unreadable == 2
    assert "2 unreadable" in selection.describe()


def test_cap_keeps_whole_documents_and_is_told(tmp_path: Path) -> None:
    write_files(tmp_path, [f"{number}.txt" for number in range(10)])
    everything = select_text([tmp_path], 0)
    capped = select_text([tmp_path], everything.num_bytes // 2)
    assert capped.documents == everything.documents[: len(capped.documents)]
    assert 0 < capped.num_bytes <= everything.num_bytes // 2
    assert f"{capped.num_beyond_cap} of 10 files beyond the cap" in capped.describe()
    assert everything.num_beyond_cap == 0


def test_a_single_large_file_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    path.write_text("é" * 100, encoding="utf-8")
    assert select_text([path], 101).documents == ("é" * 50,)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        select_text([tmp_path / "missing"], 0)
    with pytest.raises(ConfigError, match="no readable"):
        select_text([tmp_path], 0)


def test_standard_library_is_there_without_tests_and_packages() -> None:
    selection = select_text([], 2_000_000)
    assert 1_500_000 < selection.num_bytes <= 2_000_000
    assert "the Python standard library" in selection.describe()
    assert {"site-packages", "dist-packages", "test"} <= STDLIB_LEFT_OUT


def test_tokens_are_the_text(tmp_path: Path) -> None:
    said: list[str] = []
    corpus = prepare(small_config(), tmp_path, said.append)
    assert [line.split()[0] for line in said] == ["training", "tokenizing"]
    assert corpus.train.dtype == np.uint16
    ids = np.concatenate([corpus.train, corpus.held_out])
    assert int(ids.max()) < MODEL.vocab_size
    documents = select_text(small_config().text, 0).documents
    marks = np.flatnonzero(ids == corpus.document_start)
    assert len(marks) == len(documents)
    assert corpus.tokenizer.token_to_id(DOCUMENT_START) == corpus.document_start
    for begin, end, document in zip(marks, [*marks[1:], len(ids)], documents, strict=True):
        assert corpus.tokenizer.decode(ids[begin + 1 : end].tolist()) == document


def test_second_time_comes_from_the_cache(tmp_path: Path) -> None:
    first = prepare(small_config(), tmp_path)
    said: list[str] = []
    again = prepare(small_config(seed=9), tmp_path, said.append)
    assert said == []
    assert again.key == first.key
    assert np.array_equal(again.train, first.train)
    other = prepare(small_config(model=dataclasses.replace(MODEL, vocab_size=400)), tmp_path, said.append)
    assert said
    assert other.key != first.key


def damaged(entry: Path, change: Callable[[dict[str, Any]], None]) -> None:
    meta = json.loads((entry / "meta.json").read_text())
    change(meta)
    (entry / "meta.json").write_text(json.dumps(meta))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a dtype of objects": lambda entry: damaged(entry, lambda meta: meta.update(dtype="O")),
    "another dtype": lambda entry: damaged(entry, lambda meta: meta.update(dtype="<f8")),
    "no dtype": lambda entry: damaged(entry, lambda meta: meta.pop("dtype")),
    "a list": lambda entry: (entry / "meta.json").write_text("[]"),
    "no JSON": lambda entry: (entry / "meta.json").write_text('{"dtype": "<u2", '),
    "no text": lambda entry: (entry / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "no meta.json": lambda entry: (entry / "meta.json").unlink(),
    "a number that is none": lambda entry: damaged(entry, lambda meta: meta.update(num_tokens="many")),
    "documents beyond the end": lambda entry: damaged(entry, lambda meta: meta["document_starts"].append(10**9)),
    "too few tokens": lambda entry: (entry / "tokens.bin").write_bytes((entry / "tokens.bin").read_bytes()[:-10]),
    "no tokens": lambda entry: (entry / "tokens.bin").write_bytes(b""),
    "a flipped token": lambda entry: flipped(entry / "tokens.bin"),
    "a flipped tokenizer": lambda entry: flipped(entry / "tokenizer.json"),
}


@pytest.fixture(scope="module")
def entry_of_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    text = cache / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(" ".join(f"word{number * k % 97}" for k in range(60)))
    prepare(small_config(text=(text,)), cache)
    return cache


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_built_again(entry_of_text: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches faults, tracebacks and other tokens from a cache that is not as it was written."""
    config = small_config(text=(entry_of_text / "text",))
    first = prepare(config, entry_of_text)
    (entry,) = (path for path in (entry_of_text / "pretrain").iterdir() if path.is_dir())
    expected = np.array(first.train)
    DAMAGES[damage](entry)
    said: list[str] = []
    with caplog.at_level("WARNING", logger="pycomm"):
        again = prepare(config, entry_of_text, said.append)
    assert np.array_equal(again.train, expected)
    assert len(said) == 2
    assert "is damaged and is built again" in caplog.text
    caplog.clear()
    prepare(config, entry_of_text)
    assert not caplog.text


def test_several_at_once_build_it_once(tmp_path: Path) -> None:
    # Threads stand for processes: each opens the lock's file itself, which is what the lock belongs to.
    said: list[str] = []
    with ThreadPoolExecutor(4) as threads:
        corpora = list(threads.map(lambda _: prepare(small_config(), tmp_path, said.append), range(4)))
    assert len(said) == 2
    assert {corpus.key for corpus in corpora} == {corpora[0].key}


def test_an_interrupted_build_leaves_no_entry(tmp_path: Path) -> None:
    class BuildInterruptedError(Exception):
        pass

    def interrupt(line: str) -> None:
        if line.startswith("tokenizing"):
            raise BuildInterruptedError

    with pytest.raises(BuildInterruptedError):
        prepare(small_config(), tmp_path, interrupt)
    assert [path.suffix for path in (tmp_path / "pretrain").iterdir()] == [".lock"]
    assert len(prepare(small_config(), tmp_path).train) > 0


def test_too_little_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words")
    with pytest.raises(ConfigError, match="too little text"):
        prepare(small_config(text=(path,)), tmp_path / "cache")


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), share=st.floats(0.01, 0.5))
def test_held_out_part_starts_at_a_document_if_one_is_near(lengths: list[int], share: float) -> None:
    starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    total = sum(lengths)
    cut = held_out_start(total, starts, share)
    held_out = total - cut
    assert total * share <= held_out <= 2 * total * share + 1
    if cut not in starts:
        assert held_out < total * share + 1
        assert not [start for start in starts if total * share <= total - start <= 2 * total * share]


def test_held_out_share_is_used(tmp_path: Path) -> None:
    corpus = prepare(small_config(data=DataConfig(held_out=0.25)), tmp_path)
    total = len(corpus.train) + len(corpus.held_out)
    assert 0.25 <= len(corpus.held_out) / total <= 0.5


def test_a_forbidden_file_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, ["a.txt", "b.txt"])
    read = Path.read_text

    def forbid_b(path: Path, encoding: str) -> str:  # by hand: root may read every file
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, encoding=encoding)

    monkeypatch.setattr(Path, "read_text", forbid_b)
    selection = select_text([tmp_path], 0)
    assert selection.documents == ("this is a.txt\n",)
    assert selection.num_unreadable == 1
