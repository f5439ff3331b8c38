"""Tokens on disk: a byte-pair tokenizer trained on the run's text, and the text as one memory-mapped array of ids.

Both are cached, since they cost seconds and depend on the text alone. A cache entry is one folder that appears complete
or not at all: it is built under another name and renamed, and a lock lets one of several processes build it while the
others wait. Entries hold JSON and raw integers, nothing that executes when it is read; what does not read as it was
written, checksums among it, is built again.

Ref: "Neural Machine Translation of Rare Words with Subword Units" (2016) for byte-pair encoding; GPT-2 (2019) for doing
it on bytes, so that every text can be encoded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pycomm.pretrain.config import ConfigError, PretrainConfig
from pycomm.pretrain.files import checksum, file_errors, locked, own_folder
from pycomm.pretrain.text import TextSelection, select_text

DOCUMENT_START = "<|document|>"
FORMAT = 2  # part of the cache key: raise it when a cached entry would mean something else
ENCODE_AT_ONCE = 256  # documents; bounds the memory that token lists take

_DTYPES = ("<u2", "<u4")  # of tokens.bin
_log = logging.getLogger("pycomm")

TokenArray = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Corpus:
    """Tokenized text of a run.

    Attributes:
        tokenizer: turns text to ids and back.
        train: [N] uint16 or uint32, memory-mapped ids to learn from.
        held_out: [M], the ids after them.
        key: names text and tokenizer; equal keys mean equal tokens.
        text: one line for people about where the text comes from.
    """

    tokenizer: Tokenizer
    train: TokenArray
    held_out: TokenArray
    key: str
    text: str

    @property
    def document_start(self) -> int:
        """The id that stands before each document."""
        return self.tokenizer.get_vocab()[DOCUMENT_START]


def prepare(config: PretrainConfig, cache_dir: Path, report: Callable[[str], None] = lambda _: None) -> Corpus:
    """The corpus of a run: out of the cache, or built and put there.

    Args:
        config: says which text, how much of it, and the size of the vocabulary.
        cache_dir: folder of the cache; created if needed.
        report: is told in words what is being done.

    Raises:
        ConfigError: no text was found, or too little for one sequence to learn from and one to validate with.
        FileError: the cache cannot be written, or others than this user can.
    """
    selection = select_text(config.text, int(config.data.max_text_mb * 1e6))
    identity = f"{FORMAT} {selection.digest()} {config.model.vocab_size}"
    folder = own_folder(own_folder(cache_dir) / "pretrain")
    entry = folder / hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    with locked(entry.with_suffix(".lock")), file_errors(f"the cache {folder}", "make room, or set PYCOMM_CACHE_DIR"):
        if not entry.exists():
            _build(entry, selection, config.model.vocab_size, report)
        try:
            stored = _read(entry)
        except (OSError, ValueError) as error:
            _log.warning("the cached corpus %s is damaged and is built again: %s", entry, error)
            shutil.rmtree(entry)
            _build(entry, selection, config.model.vocab_size, report)
            stored = _read(entry)
    return _corpus(stored, selection, config)


def _build(entry: Path, selection: TextSelection, vocab_size: int, report: Callable[[str], None]) -> None:
    for leftover in entry.parent.glob(f"{entry.name}.*.tmp"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover)
    work = Path(tempfile.mkdtemp(prefix=entry.name + ".", suffix=".tmp", dir=entry.parent))
    try:
        report(f"training a byte-pair tokenizer of {vocab_size} tokens")
        tokenizer = _train_tokenizer(selection.documents, vocab_size)
        (work / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        report(f"tokenizing {selection.num_bytes / 1e6:.1f} MB")
        meta = _write_tokens(work / "tokens.bin", tokenizer, selection.documents)
        meta["checksums"] = {name: checksum(work / name, "blake2b") for name in ("tokenizer.json", "tokens.bin")}
        (work / "meta.json").write_text(json.dumps(meta))
        work.rename(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # what an error or an interruption left; after the rename, nothing


def _train_tokenizer(documents: tuple[str, ...], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _write_tokens(path: Path, tokenizer: Tokenizer, documents: tuple[str, ...]) -> dict[str, Any]:
    """Write all documents' ids after each other, each after a document mark; returns what ``_read`` needs to know."""
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32).newbyteorder("<")
    mark = np.array([tokenizer.token_to_id(DOCUMENT_START)], dtype)
    starts: list[int] = []
    num_tokens = 0
    with path.open("wb") as file:
        for first in range(0, len(documents), ENCODE_AT_ONCE):
            for encoding in tokenizer.encode_batch_fast(list(documents[first : first + ENCODE_AT_ONCE])):
                starts.append(num_tokens)
                ids = np.concatenate([mark, np.array(encoding.ids, dtype)])
                file.write(ids.tobytes())
                num_tokens += len(ids)
        file.flush()
        os.fsync(file.fileno())
    return {"dtype": dtype.str, "num_tokens": num_tokens, "document_starts": starts}


@dataclass(frozen=True)
class _Stored:
    """A cache entry, read and checked."""

    tokenizer: Tokenizer
    learned: bytes  # the tokenizer's file
    tokens: TokenArray
    document_starts: list[int]


def _read(entry: Path) -> _Stored:
    """Raises OSError or ValueError if the entry is not as it was written; nothing in it is trusted before."""
    meta = json.loads((entry / "meta.json").read_text())
    if not isinstance(meta, dict) or meta.get("dtype") not in _DTYPES:
        raise ValueError("meta.json names no dtype that tokens have")
    num_tokens, starts, checksums = meta.get("num_tokens"), meta.get("document_starts"), meta.get("checksums")
    if not isinstance(num_tokens, int) or not isinstance(starts, list) or not isinstance(checksums, dict):
        raise ValueError("meta.json lacks num_tokens, document_starts or checksums")
    if not all(isinstance(start, int) and 0 <= start < num_tokens for start in starts):
        raise ValueError("a document starts outside of the tokens")
    for name in ("tokenizer.json", "tokens.bin"):
        if checksums.get(name) != checksum(entry / name, "blake2b"):
            raise ValueError(f"{name} is not what was written")
    tokens: TokenArray = np.memmap(entry / "tokens.bin", np.dtype(meta["dtype"]), mode="r")
    if len(tokens) != num_tokens:
        raise ValueError(f"tokens.bin has {len(tokens)} tokens, meta.json says {num_tokens}")
    learned = (entry / "tokenizer.json").read_bytes()
    return _Stored(Tokenizer.from_buffer(learned), learned, tokens, starts)


def _corpus(stored: _Stored, selection: TextSelection, config: PretrainConfig) -> Corpus:
    tokens = stored.tokens
    cut = held_out_start(len(tokens), stored.document_starts, config.data.held_out)
    need = config.model.max_seq + 1
    if cut < need or len(tokens) - cut < need:
        raise ConfigError(
            f"too little text: {cut} tokens to learn from and {len(tokens) - cut} held out, but a sequence takes "
            f"{need} (--model.max-seq {config.model.max_seq}); give more --text or a shorter sequence"
        )
    # Not the entry's name: another version of the tokenizers library may learn other merges from the same text.
    key = hashlib.blake2b(selection.digest().encode() + stored.learned, digest_size=12).hexdigest()
    return Corpus(stored.tokenizer, tokens[:cut], tokens[cut:], key, selection.describe())


def held_out_start(num_tokens: int, document_starts: list[int], share: float) -> int:
    """Where the held-out tokens start: between two documents if one starts near, else in the middle of one.

    Near means that the held-out share is at least the one asked for and at most twice it; the smallest such wins.
    """
    latest = num_tokens - int(np.ceil(num_tokens * share))
    earliest = num_tokens - int(np.ceil(num_tokens * min(2 * share, 1)))
    near = [start for start in document_starts if earliest <= start <= latest]
    return max(near) if near else latest
