"""What ranks write into the store on their way to each other, and what is checked of what they read there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pycomm import _C
from pycomm.errors import PeerLostError, PeerTimeoutError, PycommError
from pycomm.process import Process

__all__ = ["Failure", "Greeting", "Seat", "decoded", "encoded", "host_identity"]

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Greeting:
    """What every rank shows to all before anything is built. All fields but the host's and the GPU's must be equal.

    ``nccl``, ``obstacle`` and ``gpu`` are what :class:`pycomm.backends.nccl.Offer` has.
    """

    world_size: int
    backend: str
    strict: bool = False
    nccl: str = ""
    obstacle: str = ""
    gpu: str = ""
    version: str = field(default_factory=_C.version)
    build: str = field(default_factory=lambda: f"{_C.build_id():x}")
    protocol: int = field(default_factory=_C.protocol_version)
    host: str = field(default_factory=lambda: host_identity())


@dataclass(frozen=True)
class Seat(Process):
    """Whose turn a rank is in ``round``, or was in an earlier one."""

    round: int
    rank: int
    token: int  # of the process, in errors
    claim: str  # random, so that a rank recognises what it has written

    @property
    def process(self) -> Process:
        return Process(self.host, self.boot, self.namespace, self.pid, self.start)


@dataclass(frozen=True)
class Failure:
    """Why a round cannot end, as the first rank to find out tells it.

    Attributes:
        kind: "lost", "missing" (``ranks`` did not come in time) or "conflict" (two jobs).
        roots: the processes of ``ranks``, as far as they are known.
    """

    kind: str
    ranks: list[int]
    text: str
    roots: list[int] = field(default_factory=list)

    def error(self) -> PycommError:
        if self.kind == "conflict":
            return PycommError(self.text)
        error: PycommError = PeerLostError(self.text, lost_ranks=self.ranks)
        if self.kind == "missing":
            error = PeerTimeoutError(self.text, op="init", missing_ranks=self.ranks)
        error._root = (self.roots, self.text)
        return error


def host_identity() -> str:
    """Equal for processes that can share memory over abstract sockets: same boot, same network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


def encoded(record: Failure) -> str:
    return json.dumps(asdict(record))


def decoded(cls: type[_Record], data: bytes, what: str) -> _Record:
    """A record of these fields and types.

    Raises:
        PycommError: it is something else.
    """
    hints = get_type_hints(cls)
    names = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
    try:
        values: Any = json.loads(data.decode("utf-8"))
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError("other fields")
        for name, value in values.items():
            if hints[name] == list[int]:
                if type(value) is not list or any(type(item) is not int for item in value):
                    raise ValueError(f"{name} is no list of numbers")
            elif type(value) is not hints[name]:
                raise ValueError(f"{name} is a {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise PycommError(
            f"init: {what} makes no sense ({error}): all ranks need one installation of pycomm, and a store that "
            f"nothing else writes into"
        ) from error
    return cls(**values)
