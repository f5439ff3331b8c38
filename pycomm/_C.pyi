"""The compiled extension. Tensors cross as addresses and counts, so its build needs no torch."""

from collections.abc import Sequence

MAX_RANKS: int

def version() -> str:
    """The version of pycomm that the extension was built from."""

def build_id() -> int:
    """A hash of the sources that the extension was built from; ranks that meet must have the same one."""

def protocol_version() -> int:
    """Of the greetings and structs that ranks exchange."""

def simd_level() -> str:
    """The instruction set that reductions use now: "baseline" (SSE2 or NEON), "avx2" or "avx512"."""

def best_simd_level() -> str:
    """The best instruction set of this processor."""

def set_simd_level(name: str) -> None:
    """Use another instruction set, for tests and comparisons; the bits of finite results stay the same.

    Raises:
        ValueError: the processor has no such instructions, or the name is unknown.
    """

def reduce(dtype: str, op: str, sources: list[int], destinations: list[int], count: int) -> None:
    """Combine ``count`` elements of every source, in order, into every destination; both are addresses.

    Raises:
        ValueError: an unknown dtype or op, "avg" over integers, or no source or destination.
    """

class Work:
    """An operation on the progress thread."""

    def done(self) -> bool: ...
    def source(self) -> int: ...
    def wait(self, timeout_s: float | None = None) -> None: ...

class SymmetricBuffer:
    """A range of symmetric memory, through the buffer protocol; dropping it releases the range locally."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Listener:
    """Where the other ranks of a host find rank 0: a socket in the abstract namespace with a random name."""

    def __init__(self) -> None: ...
    @property
    def address(self) -> str: ...

class HostCommunicator:
    """The host transport's communicator. Codes of dtypes and ops are those of csrc/include/pycomm/types.hpp."""

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int,
        listener: Listener | None,
        address: str,
        timeout_s: float,
        strict: bool,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def name(self) -> str: ...
    def tuning(self) -> dict[str, int]:
        """Sizes and thresholds in bytes: ``slice_bytes``, ``one_shot_bytes``; rank 0's, on every rank."""

    def all_reduce(
        self, data: int, count: int, dtype: int, op: int, async_op: bool, timeout_s: float, /
    ) -> Work | None: ...
    def broadcast(
        self, data: int, count: int, dtype: int, root: int, async_op: bool, timeout_s: float, /
    ) -> Work | None: ...
    def reduce(
        self, data: int, count: int, dtype: int, op: int, root: int, async_op: bool, timeout_s: float, /
    ) -> Work | None: ...
    def reduce_scatter(
        self,
        output: int,
        input: int,
        dtype: int,
        counts: Sequence[int],
        op: int,
        async_op: bool,
        timeout_s: float,
        /,
    ) -> Work | None: ...
    def all_gather(
        self, output: int, input: int, dtype: int, counts: Sequence[int], async_op: bool, timeout_s: float, /
    ) -> Work | None: ...
    def all_to_all(
        self, output: int, input: int, dtype: int, counts: Sequence[int], async_op: bool, timeout_s: float, /
    ) -> Work | None: ...
    def all_to_all_by_splits(
        self,
        output: int,
        input: int,
        dtype: int,
        output_counts: Sequence[int],
        input_counts: Sequence[int],
        async_op: bool,
        timeout_s: float,
        /,
    ) -> Work | None: ...
    def gather(
        self,
        output: int,
        input: int,
        dtype: int,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
        /,
    ) -> Work | None: ...
    def scatter(
        self,
        output: int,
        input: int,
        dtype: int,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
        /,
    ) -> Work | None: ...
    def send(
        self, data: int, count: int, dtype: int, dst: int, tag: int, async_op: bool, timeout_s: float, /
    ) -> Work | None: ...
    def recv(
        self, data: int, count: int, dtype: int, src: int, tag: int, async_op: bool, timeout_s: float, /
    ) -> Work | int:
        """Returns the source; ``src`` -1: any."""

    def exchange_messages(
        self, messages: Sequence[tuple[bool, int, int, int, int, int]], async_op: bool, timeout_s: float, /
    ) -> Work | list[int]:
        """Messages (is_send, address, elements, dtype, peer, tag) that progress together; returns their sources."""

    def barrier(self, async_op: bool, timeout_s: float, /) -> Work | None: ...
    def empty(self, bytes: int, timeout_s: float) -> SymmetricBuffer: ...
    def peer(self, data: int, bytes: int, rank: int, /) -> SymmetricBuffer: ...
    def post(self, flag: int, value: int, /) -> None: ...
    def wait_posted(self, flag: int, value: int, timeout_s: float, /) -> None: ...
    def is_symmetric(self, data: int, bytes: int, /) -> bool: ...
    def split(self, color: int | None, key: int, timeout_s: float, /) -> HostCommunicator | None: ...
    def abort(self, reason: str, /) -> None: ...
    def close(self, drain_s: float) -> None: ...
