"""How processes that were launched together find each other: a store, and a greeting over it.

The store is, in this order: one that the caller gives; that of an initialised torch.distributed; torchrun's; one that
rank 0 opens on MASTER_ADDR alone. Keys carry the run id, the restart attempt and how often this rank has called
``init`` on that store. The store is the job's own and is trusted; values are JSON, never pickle.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pycomm import _C, env
from pycomm.errors import MismatchError, PeerTimeoutError, PycommError

__all__ = ["Greeting", "Rendezvous"]

_POLL_S = 0.01


@dataclass(frozen=True)
class Greeting:
    """What every rank shows to all before anything is built. All fields but the host's and the GPU's must be equal.

    ``nccl``, ``obstacle`` and ``gpu`` are what :class:`pycomm.backends.nccl.Offer` has.
    """

    version: str
    build: str
    protocol: int
    world_size: int
    backend: str
    strict: bool
    host: str
    nccl: str = ""
    obstacle: str = ""
    gpu: str = ""

    @classmethod
    def of_this_process(
        cls, world_size: int, backend: str, strict: bool = False, nccl: str = "", obstacle: str = "", gpu: str = ""
    ) -> Greeting:
        return cls(
            version=_C.version(),
            build=f"{_C.build_id():x}",
            protocol=_C.protocol_version(),
            world_size=world_size,
            backend=backend,
            strict=strict,
            host=host_identity(),
            nccl=nccl,
            obstacle=obstacle,
            gpu=gpu,
        )


def host_identity() -> str:
    """Equal for processes that can share memory over abstract sockets: same boot, same network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


class Rendezvous:
    """Rank, world size and a store that all ranks reach; a world of one has no store.

    Args:
        store: a torch.distributed Store, with ``rank`` and ``world_size``; None to find one.
        timeout_s: seconds that any wait for other ranks may take.

    Raises:
        ValueError: arguments or environment variables contradict each other or are missing.
        PycommError: the store cannot be opened or reached.
    """

    def __init__(self, store: dist.Store | None, rank: int | None, world_size: int | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._store: dist.Store | None = None
        self._is_one_host = True
        self._owner = store  # keeps a TCPStore's server alive
        launched = env.launch() if rank is None or world_size is None or store is None else None
        if rank is not None or world_size is not None:
            if rank is None or world_size is None:
                raise ValueError("give both rank and world_size, or neither")
            if not 0 <= rank < world_size:
                raise ValueError(f"rank={rank} is not in 0 … world_size - 1 = {world_size - 1}")
            self.rank, self.world_size = rank, world_size
        elif store is None and dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            self._owner = dist.distributed_c10d._get_default_store()
        elif launched is not None:
            self.rank, self.world_size = launched.rank, launched.world_size
        elif store is not None:
            raise ValueError("a store needs rank and world_size: pass them, or set RANK and WORLD_SIZE")
        else:
            self.rank, self.world_size = 0, 1
        if self.world_size == 1:
            return
        if self._owner is None:
            if launched is None:
                raise ValueError(
                    f"world_size={self.world_size} needs a way for the ranks to meet: pass store=, start with "
                    f"torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
                )
            self._owner = _open_store(launched, timeout_s)
        run = f"{launched.run_id}/{launched.restart}" if launched is not None else "none/0"
        count = self._owner.add(f"pycomm/{run}/inits/{self.rank}", 1)
        self._store = dist.PrefixStore(f"pycomm/{run}/{count}", self._owner)

    @property
    def store(self) -> dist.Store | None:
        """The store of this call of init, for connections that are made through one; None in a world of one."""
        return self._store

    def address(self) -> str:
        """This host's own address on the way to the store, for others to connect to; 127.0.0.1 where it has none."""
        store = self._owner
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if not isinstance(store, dist.TCPStore):
            return "127.0.0.1" if self._is_one_host else socket.gethostname()
        family, kind, protocol, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: chooses the route, sends nothing
            return str(probe.getsockname()[0])

    def put(self, key: str, value: str) -> None:
        """Publish ``value`` under ``key``."""
        if self._store is not None:
            self._store.set(key, value)

    def get(self, key: str, *, rank: int) -> str:
        """Wait for what ``rank`` publishes under ``key``.

        Raises:
            PeerTimeoutError: it did not come within the timeout.
        """
        assert self._store is not None
        self._wait({rank: key})
        return str(self._store.get(key), "utf-8")

    def greet(self, backend: str, strict: bool, nccl: str = "", obstacle: str = "", gpu: str = "") -> list[Greeting]:
        """Exchange greetings; returns everyone's, by rank. The arguments are those of :class:`Greeting`.

        Raises:
            MismatchError: versions, builds, protocols, world sizes or back ends differ; names both sides.
            PeerTimeoutError: ranks did not come; names them.
        """
        mine = Greeting.of_this_process(self.world_size, backend, strict, nccl, obstacle, gpu)
        if self._store is None:
            return [mine]
        self.put(f"greeting/{self.rank}", json.dumps(asdict(mine)))
        self._wait({r: f"greeting/{r}" for r in range(self.world_size)})
        texts = self._store.multi_get([f"greeting/{r}" for r in range(self.world_size)])
        greetings = [Greeting(**json.loads(str(text, "utf-8"))) for text in texts]
        self._is_one_host = len({greeting.host for greeting in greetings}) == 1
        fields = ["version", "protocol", "build", "world_size", "backend", "strict"]
        if not any(greeting.obstacle for greeting in greetings):  # else that says more
            fields.append("nccl")
        for field in fields:
            values = {r: str(getattr(greeting, field)) for r, greeting in enumerate(greetings)}
            if len(set(values.values())) == 1:
                continue
            other = next(r for r in values if values[r] != values[self.rank])
            raise MismatchError(
                f"init: ranks differ in {field}: rank {self.rank} has {values[self.rank]}, rank {other} has "
                f"{values[other]}; all ranks need one installation of pycomm and the same arguments of init()",
                calls={r: f"init({field}={value})" for r, value in values.items()},
            )
        return greetings

    def _wait(self, keys: dict[int, str]) -> None:
        """Wait until every rank has set its key. Polls, so that Ctrl-C works and torch does not report each slice."""
        assert self._store is not None
        deadline = time.monotonic() + self.timeout_s
        try:
            while not self._store.check(list(keys.values())):
                if time.monotonic() < deadline:
                    time.sleep(_POLL_S)
                    continue
                missing = [r for r, key in keys.items() if not self._store.check([key])]
                if not missing:
                    return
                raise PeerTimeoutError(
                    f"init: rank(s) {', '.join(map(str, missing))} of {self.world_size} did not come within "
                    f"{self.timeout_s:g} s",
                    op="init",
                    missing_ranks=missing,
                )
        except dist.DistError as error:
            raise PycommError(f"init: the store of this job cannot be reached any more: {error}") from error


def _open_store(launched: env.Launch, timeout_s: float) -> dist.Store:
    """Connect to the launcher's store, or serve one from rank 0 on MASTER_ADDR alone."""
    serves = launched.rank == 0 and not launched.agent_store
    where = f"MASTER_ADDR={launched.master_addr} MASTER_PORT={launched.master_port}"
    try:
        listener = _listen(launched.master_addr, launched.master_port) if serves else None
        return dist.TCPStore(
            launched.master_addr,
            launched.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # shared with a later init_process_group() of this process
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except (OSError, dist.DistError) as error:
        advice = "choose a free port, and an address of the host where rank 0 runs" if serves else "is rank 0 running?"
        raise PycommError(f"init: no store at {where}: {error}; {advice}") from error


def _listen(host: str, port: int) -> socket.socket | None:
    """A listening socket on that address alone, since torch's own server would listen on every interface.

    Returns:
        None if the port is taken: by this process's own store, which torch shares then, or by somebody else, and then
        the TCPStore says so.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return listener
