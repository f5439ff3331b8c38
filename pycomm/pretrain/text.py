"""Which text a run learns from: the standard library's sources, or files and folders of the user's.

The choice is deterministic: the same files give the same documents in the same order on every machine, whatever order
the file system lists them in. Nothing is dropped silently; ``TextSelection.describe`` says what was left out.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pycomm.pretrain.config import ConfigError, printable

# Tests are two thirds of a standard library and often stripped from it; the others are tables, not programs. Installed
# packages lie in the same folder but differ from machine to machine.
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)


@dataclass(frozen=True)
class TextSelection:
    """Documents chosen for a run.

    Attributes:
        documents: the texts, shuffled in a fixed order.
        source: where they come from, for people.
        num_files: files that were found.
        num_unreadable: files skipped because they could not be read or are not UTF-8 text.
        num_beyond_cap: files left out, and at most one cut short, because of the cap.
        num_bytes: size of ``documents`` in UTF-8.
    """

    documents: tuple[str, ...]
    source: str
    num_files: int
    num_unreadable: int
    num_beyond_cap: int
    num_bytes: int

    def digest(self) -> str:
        """Hex digest of the documents' content and order."""
        state = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            data = document.encode()
            state.update(len(data).to_bytes(8, "little") + data)
        return state.hexdigest()

    def describe(self) -> str:
        """One line for people: how much text, from where, what was left out."""
        line = f"{self.num_bytes / 1e6:.1f} MB in {len(self.documents)} documents from {self.source}"
        if self.num_beyond_cap:
            line += f"; {self.num_beyond_cap} of {self.num_files} files beyond the cap (--data.max-text-mb)"
        if self.num_unreadable:
            line += f"; {self.num_unreadable} unreadable or not UTF-8 text, skipped"
        return line


def select_text(paths: Iterable[Path], max_bytes: int) -> TextSelection:
    """Read the text of a run.

    Args:
        paths: files and folders (searched recursively, hidden entries left out); none: the standard library.
        max_bytes: stop before the document that would exceed this; 0: no limit. A first document that is larger by
            itself is cut.

    Raises:
        ConfigError: a path does not exist, or no text was found.
    """
    paths = list(paths)
    if paths:
        source = printable(", ".join(str(path) for path in paths))
        names = _user_files(paths)
    else:
        source = "the Python standard library"
        names = _stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    # Sorting by a hash of the name is a shuffle that does not depend on which other files exist.
    ordered = sorted(names, key=lambda name: (hashlib.blake2b(os.fsencode(name), digest_size=16).digest(), name))
    documents: list[str] = []
    used = unreadable = beyond = 0
    for name in ordered:
        if beyond:
            beyond += 1
            continue
        document = _read(names[name])
        if document is None:
            unreadable += 1
            continue
        size = len(document.encode())
        if max_bytes and used + size > max_bytes:
            beyond += 1
            if documents:
                continue
            document = document.encode()[:max_bytes].decode(errors="ignore")
            size = len(document.encode())
        if document:
            documents.append(document)
            used += size
    if not documents:
        raise ConfigError(f"no readable UTF-8 text in {source} ({len(ordered)} files found)")
    return TextSelection(tuple(documents), source, len(ordered), unreadable, beyond, used)


def _stdlib_files(root: Path) -> dict[str, Path]:
    return {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if not STDLIB_LEFT_OUT.intersection(path.relative_to(root).parts)
    }


def _user_files(paths: Iterable[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for index, path in enumerate(paths):
        if os.path.isfile(path):
            names[f"{index}/{path.name}"] = path
        elif os.path.isdir(path):
            names.update({f"{index}/{found.relative_to(path).as_posix()}": found for found in _visible(path)})
        else:
            raise ConfigError(f"--text {printable(str(path))}: no such file or folder")
    return names


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _read(path: Path) -> str | None:
    """The file's text, or None if it cannot be read or is not text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text
