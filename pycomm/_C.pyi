"""The compiled extension. It reads tensors through DLPack's C exchange interface, so its build needs no torch."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

MAX_RANKS: int
AT_ROOT: str  # in an error's text, before what the process at the root of the wait is in
ADDRESS_DIGITS: int

def version() -> str:
    """The version of pycomm that the extension was built from."""

def tuning(world_size: int, thresholds: dict[str, int]) -> dict[str, int]:
    """The host transport's thresholds in bytes for so many ranks here, with ``thresholds`` in place of the defaults."""

def cuda_build() -> str:
    """The CUDA version and architectures that the kernels were built with; empty: without kernels."""

def build_id() -> int:
    """A hash of the sources that the extension was built from; ranks that meet must have the same one."""

def process_token() -> int:
    """Identifies this process in errors: random, another one in a forked child."""

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
        ValueError: an unknown dtype or op, an op that the dtype has not, or no source or destination.
    """

# Of arguments that are no call's; pycomm/arguments.py. All raise ValueError, or TypeError for what is of a wrong type.
DTYPES: tuple[str, ...]
"""Of all dtypes that calls move, by number; the first NUM_NUMBER_TYPES have arithmetic of their own."""
NUM_NUMBER_TYPES: int
LONGEST_TIMEOUT_S: float

def checked_tensor(argument: Any, name: str, cuda_index: int, /) -> torch.Tensor:
    """The tensor itself, or one on an array's memory. ``cuda_index`` -1: on the host."""

def checked_timeout(seconds: Any, /) -> float: ...

class Waits:
    """What the threads of a communicator in Python wait for: a signal handler runs inside such a wait.

    ``look`` is called a few times a second while a thread waits for one of its operations, ``rest`` afterwards.
    """

    def __init__(
        self, rank: int, group: str, look: Callable[[], None] | None = None, rest: Callable[[], None] | None = None
    ) -> None: ...
    def check_outside(self) -> None:
        """PycommError if this thread waits in a collective."""

    def of_this_thread(self) -> str | None:
        """The call that this thread waits in."""

class Work:
    """An operation that is under way. It keeps its tensors alive until it is over, even if the Work itself is dropped.

    Back ends in Python make one for what they do, and end it with :meth:`finish` or :meth:`fail`.
    """

    def __init__(self, waits: Waits, call: str, is_collective: bool = False) -> None: ...
    @staticmethod
    def relayed(
        waits: Waits,
        call: str,
        parts: Sequence[Work],
        wait: Callable[[float | None], None],
        ranks: Sequence[int] = (),
    ) -> Work:
        """One that is over when ``parts`` are, and whose :meth:`wait` is ``wait``. ``ranks``: of their sources."""

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is over; raise what went wrong in it.

        Args:
            timeout_s: seconds to wait here, 0 to look once; None: as long as the operation's own timeout lets it run.
                With ``timeout_s`` the host waits for a GPU, too; else the current stream does.

        Raises:
            TimeoutError: not over after ``timeout_s``; the operation goes on.
            PycommError: the operation failed.
        """

    def is_awaited(self) -> bool:
        """Return whether a thread waits for it, or is to be told of its end."""

    def done(self) -> bool:
        """Return True once the operation is over, well or not."""

    @property
    def source(self) -> int:
        """After the end of a ``recv``: the rank that sent."""

    def announce(self, completions: Completions, token: int, /) -> None:
        """Put ``token`` into ``completions`` when the operation is over, at once if it is."""

    def finish(self, source: int = -1) -> None:
        """It is over, well; the first end counts."""

    def fail(self, error: BaseException, /) -> None:
        """It is over with ``error``, which :meth:`wait` raises."""

class Completions:
    """Tells one thread, which takes tokens, what operations are over. Whoever ends an operation runs no Python."""

    def __init__(self) -> None: ...
    def take(self, timeout_s: float | None = None) -> int | None:
        """The next token, waiting for it; None once closed, TimeoutError after ``timeout_s``."""

    def close(self) -> None: ...

class Call:
    """A call as data: what ranks compare before they take part in it, and this rank's memory in it.

    ``str`` is "all_reduce(sum, float32[1024])". Of messages ``root`` is the peer, -1 any source.

    Args:
        splits: of messages the tag.
    """

    def __init__(self, kind: str, *, dtype: str = "uint8", root: int = 0, count: int = 0, splits: int = 0) -> None: ...
    @staticmethod
    def unpack(packed: bytes, /) -> Call:
        """What :meth:`pack` made, on any rank; without memory."""

    def pack(self) -> bytes:
        """The 24 bytes that ranks compare."""

    @property
    def kind(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def root(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def by_splits(self) -> bool: ...
    @property
    def tag(self) -> int: ...
    @property
    def output(self) -> int:
        """The address."""

    @property
    def output_counts(self) -> list[int]:
        """Elements of each rank's part."""

    @property
    def input_counts(self) -> list[int]: ...
    def at(self, output: int, input: int, /) -> Call:
        """The same on other memory."""

    def by_kernel(self, kernel: str, memory: int, offset: int, /) -> Call:
        """The same by a kernel, of a tensor that lies ``offset`` bytes into symmetric memory number ``memory``, from 1;
        0, 0: in any memory."""

class Calls:
    """The calls of a group, with the arguments of :class:`pycomm.communicator.Communicator`'s methods.

    Arguments are checked here, for every back end: ValueError or TypeError, and nothing was sent. Calls return a Work
    when ``async_op``, else None. ``timeout_s`` None: the communicator's.
    """

    STEP_TAG: int
    """Of messages that are steps of a collective; callers may not use it."""

    @overload
    def __init__(self, host: HostCommunicator) -> None: ...
    @overload
    def __init__(self, backend: object, timeout_s: float) -> None: ...
    def all_reduce(self, tensor: Any, op: str, async_op: bool, timeout_s: float | None, /) -> Work | None: ...
    def scan(self, tensor: Any, op: str, async_op: bool, timeout_s: float | None, /) -> Work | None: ...
    def broadcast(self, tensor: Any, root: int, async_op: bool, timeout_s: float | None, /) -> Work | None: ...
    def reduce(self, tensor: Any, root: int, op: str, async_op: bool, timeout_s: float | None, /) -> Work | None: ...
    def reduce_scatter(
        self,
        output: Any,
        input: Any,
        op: str,
        input_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> Work | None: ...
    def all_gather(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> Work | None: ...
    def all_to_all(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> Work | None: ...
    def gather(self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, /) -> Work | None: ...
    def scatter(
        self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, /
    ) -> Work | None: ...
    def barrier(self, async_op: bool, timeout_s: float | None, /) -> Work | None: ...
    def send(self, tensor: Any, dst: int, tag: int, async_op: bool, timeout_s: float | None, /) -> Work | None: ...
    def recv(
        self, tensor: Any, src: int | None, tag: int, async_op: bool, timeout_s: float | None, /
    ) -> Work | int: ...
    def exchange(
        self, messages: Sequence[tuple[bool, Any, int | None, int]], async_op: bool, timeout_s: float | None, /
    ) -> Work | list[int]:
        """Messages (is it a send, tensor, peer, tag) that progress together."""

    def receive_arrived(self, tensor: Any, tag: int, timeout_s: float | None, /) -> Work | None:
        """Receive from whoever has sent a message with this tag already; None if nobody has. On the host transport."""

    def keep(self, work: Work | None, /, *tensors: Any) -> Work | None:
        """``work``, under way here until it is over, with what it reads and writes."""

    def wait(self) -> None:
        """Wait for all that are under way now; raise what went wrong in the first of them that failed."""

    def drop_finished(self) -> None: ...
    def clear(self) -> None: ...

def memory_left(root: str, /) -> list[int]:
    """Bytes that the host and each memory cgroup of this process still grant; ``root``: in place of "/", for tests."""

def tell_of(processes: Sequence[int], text: str, /) -> None:
    """This process knows that a group failed because of ``processes`` (tokens), in the words of ``text``: should it end
    before its next call in another group, that group's ranks learn of them."""

def num_heard() -> int:
    """How many failures this process has heard of."""

def last_heard() -> tuple[list[int], str]:
    """The last one: the processes at its root, and its text."""

def expect_ranks(world_size: int, /) -> None:
    """A group of several hosts has so many ranks: the way from a wait to its root may be that long."""

def serve_callers() -> None:
    """The calling thread runs calls of other threads, so that its waits are theirs."""

def shown_waits() -> tuple[bool, list[tuple[int, int]], str]:
    """Whether this process has waited for a while; the processes at the root of that, by their tokens, and over how
    many others; what the first of them is in."""

class ShownWait:
    """A caller waits for ranks of other hosts; as long as it lives, peers see the roots of that.

    ``for_work``: the caller waits for operations, whose roots others show.
    """

    def __init__(self, for_work: bool = False) -> None: ...
    def show(self, processes: Sequence[tuple[int, int]], text: str, /) -> None: ...

class Activity:
    """In its block, peers on this host whose wait for this process runs out are told that it is in ``what``."""

    def __init__(self, what: str) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

class SymmetricBuffer:
    """A range of symmetric memory, through the buffer protocol; dropping it releases the range locally."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Listener:
    """Where the other ranks of a host find rank 0: a socket in the abstract namespace with a random name."""

    def __init__(self) -> None: ...
    @property
    def address(self) -> str: ...

class HostCommunicator:
    """The host transport's communicator."""

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int,
        listener: Listener | None,
        address: str,
        timeout_s: float,
        strict: bool,
        thresholds: dict[str, int],
        names: Sequence[int] = (),
        check: Callable[[list[int]], None] | None = None,
    ) -> None:
        """Meet the other ranks of this host.

        Args:
            names: by rank, what errors call it; empty: its number.
            check: called about every 50 ms with the names of the ranks that are still missing; it raises when waiting
                for them is in vain.
        """
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def tokens(self) -> list[int]:
        """By rank, its process: a random number, the same in all its communicators."""

    def tuning(self) -> dict[str, int]:
        """Sizes and thresholds in bytes, by name (docs/tuning.md); rank 0's, on every rank."""

    def empty(self, bytes: int, timeout_s: float) -> SymmetricBuffer: ...
    def agree(self, row: bytes, kind: str, count: int, timeout_s: float, /) -> list[bytes]:
        """Every rank's row, by rank; see :meth:`pycomm.backends.Backend.agree`."""

    def peer(self, data: int, bytes: int, rank: int, /) -> SymmetricBuffer: ...
    def post(self, flag: int, value: int, /) -> None: ...
    def wait_posted(self, flag: int, value: int, rank: int | None, timeout_s: float, /) -> None: ...
    def is_symmetric(self, data: int, bytes: int, /) -> bool: ...
    def exchange_fds(self, fd: int, timeout_s: float) -> list[int]:
        """Collective: a descriptor of every rank's ``fd``, by rank, for the caller to close."""

    def split(self, color: int | None, key: int, timeout_s: float, /) -> HostCommunicator | None: ...
    def abort(self, reason: str, /) -> None: ...
    def close(self, drain_s: float) -> None: ...

NORM_BLOCK: int

class Runs:
    """Runs of elements that a rank owns: (grad, param, packed, count, first_block, group); all but the last in elements
    and blocks, as csrc/host/gradient_step.hpp says."""

    def __init__(self, rows: Sequence[tuple[int, int, int, int, int, int]]) -> None: ...

class GradientReduction:
    """Which gradients to average, and where the averages and the norms of their blocks go. Addresses."""

    def __init__(
        self,
        *,
        grads: int,
        count: int,
        dtype: str,
        runs: Runs,
        to_all: bool,
        shard: int,
        shard_dtype: str,
        norms: int,
    ) -> None: ...

class ParameterUpdate:
    """What an optimizer step reads and writes. Addresses; ``master`` 0: the parameters are fp32."""

    def __init__(
        self,
        *,
        grads: int,
        grad_dtype: str,
        grads_packed: bool,
        params: int,
        count: int,
        param_dtype: str,
        master: int,
        exp_avg: int,
        exp_avg_sq: int,
        runs: Runs,
    ) -> None: ...

def reduce_gradients(
    communicator: HostCommunicator,
    reduction: GradientReduction,
    accumulate: bool,
    async_op: bool,
    timeout_s: float,
    /,
) -> Work | None: ...
def update_everywhere(
    communicator: HostCommunicator,
    update: ParameterUpdate,
    groups: Sequence[tuple[float, float, float, float, float, float, float, float]],
    reduce_first: bool,
    timeout_s: float,
    /,
) -> None: ...
def update_locally(
    update: ParameterUpdate, groups: Sequence[tuple[float, float, float, float, float, float, float, float]], /
) -> None: ...
def block_norms(values: int, dtype: str, runs: Runs, norms: int, /) -> None: ...
def sum_in_order(values: int, count: int, /) -> float:
    """The sum of ``count`` float64 at an address, one after the other."""

# NCCL and the CUDA driver. Addresses are the device's, streams the driver's handles.

class NcclLibrary:
    """NCCL, loaded at run time. Needs no GPU.

    Args:
        names: files or names that the loader knows; "loaded:NAME": only if it is in the process already.

    Raises:
        BackendUnavailableError: none loads, or it is too old.
    """

    def __init__(self, names: Sequence[str]) -> None: ...
    @property
    def file(self) -> str: ...
    @property
    def version_code(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def has_call_config(self) -> bool:
        """Whether single calls take a number of CTAs."""

    @property
    def has_windows(self) -> bool:
        """Whether ranks of an NVLink domain can have each other's addresses."""

    def unique_id(self) -> bytes: ...

def nccl_version_text(code: int, /) -> str:
    """22809 is "2.28.9"."""

class CudaDriver:
    """The CUDA driver, loaded at run time and initialised.

    Raises:
        BackendUnavailableError: there is none, or it sees no GPU.
    """

    def __init__(self, names: Sequence[str]) -> None: ...
    @property
    def file(self) -> str: ...
    @property
    def version(self) -> int:
        """13000: CUDA 13.0, the newest that it serves."""

    def device_names(self) -> list[str]: ...
    def device_uuid(self, index: int) -> str:
        """In hexadecimal; of a GPU or of the part of one that the process is given."""

    def allow_queries_during_capture(self) -> None:
        """This thread may look at events while another one captures a graph."""

class CudaDevice:
    """The primary context of a device, kept."""

    def __init__(self, driver: CudaDriver, index: int) -> None: ...

class NcclOperation(Work):
    """A call that has been enqueued."""

    @property
    def seq(self) -> int:
        """Its number among the collectives of its group; of a message 0."""

    @property
    def call(self) -> str: ...
    @property
    def is_message(self) -> bool: ...
    @property
    def timeout_s(self) -> float: ...
    def expired(self) -> bool: ...
    def make_wait(self, stream: int, /) -> None:
        """What the stream does from now on comes after this operation. Does not wait."""

    def reach(self, timeout_s: float) -> bool:
        """Block until it is over on the device; False if ``timeout_s`` passes before."""

class NcclOptions:
    """How a call is made.

    Args:
        stream: the caller's.
        max_ctas: of this call; 0: NCCL's choice. Needs ``NcclLibrary.has_call_config``.
    """

    def __init__(self, stream: int, async_op: bool, timeout_s: float, max_ctas: int) -> None: ...

class NcclCommunicator:
    """One rank's non-blocking NCCL communicator, and the log of its calls for the watchdog."""

    def __init__(self, library: NcclLibrary, device: CudaDevice, rank: int, world_size: int) -> None: ...
    def connect(self, unique_id: bytes, timeout_s: float, /) -> None: ...
    def split(self, color: int | None, rank: int, world_size: int, timeout_s: float, /) -> NcclCommunicator | None: ...
    def submit(self, call: Call, options: NcclOptions, /) -> NcclOperation: ...
    def submit_kernel(self, call: Call, launch: Callable[[int], None], options: NcclOptions, /) -> NcclOperation:
        """By a kernel that ``launch`` puts on the stream that it is given."""

    def exchange(self, calls: Sequence[Call], options: NcclOptions, /) -> NcclOperation:
        """Messages in one group."""

    def error(self) -> str:
        """What NCCL or the device says has gone wrong behind calls; empty: nothing."""

    def unfinished(self) -> list[NcclOperation]: ...
    def num_calls(self) -> int:
        """Collectives that this rank has called."""

    def num_confirmed(self) -> int: ...
    def confirm(self, number: int, /) -> None: ...
    def hash(self, number: int, /) -> int: ...
    def call(self, number: int, /) -> Call: ...
    def latest(self) -> Call: ...
    def num_messages(self) -> int: ...
    def take_messages(self, most: int, /) -> bytes:
        """Messages that have not been taken: number (uint64) and packed call each."""

    def watch_kernels(self, abort_word: int, status: int, owner: object = None) -> None:
        """A group of pycomm's kernels: the device address of its abort word, which is set when this communicator fails,
        and the host address of its status, which is looked at until ``forget_kernels``. ``owner`` of both is kept."""

    def forget_kernels(self, abort_word: int, /) -> None: ...
    def kernel_failures(self) -> list[tuple[int, int, int, int, int]]:
        """code, rank, block, expected, seen of each group whose kernels have given up."""

    def aborted(self) -> bool: ...
    def abort(self) -> None: ...
    def close(self, timeout_s: float, /) -> bool:
        """Wait for what is under way and leave; False: it had to be aborted."""

class NcclWindow:
    """Memory of this rank that NCCL maps on all ranks; csrc/nccl/window.hpp. Making one is not collective.

    Raises:
        BackendUnavailableError: this NCCL has no windows.
        MemoryError: there is not so much memory.
    """

    def __init__(self, communicator: NcclCommunicator, bytes: int) -> None: ...
    def open(self, timeout_s: float, /) -> None:
        """Collective.

        Raises:
            BackendUnavailableError: a peer's memory is not mapped here.
        """

    @property
    def bytes(self) -> int: ...
    @property
    def parts(self) -> list[int]:
        """By rank, once open."""

# GPUs; pycomm/gpu. Addresses are the device's. Without CUDA code in the build, what makes an object raises
# BackendUnavailableError. A grid is (blocks, threads); dtypes and operators are names.
SIGNAL_PAD_BYTES: int
MAX_KERNEL_RANKS: int
KERNEL_EXPIRED: int  # code of a kernel that waited in vain
MAX_KERNEL_BLOCKS: int  # of a kernel that waits for other ranks
MAX_KERNEL_THREADS: int  # of a block
ONE_SHOT_BLOCKS: int
CHUNK_ELEMENTS: int

def dlpack(address: int, bytes: int, device: int, owner: object) -> Any:
    """A capsule for torch.from_dlpack: uint8 on a CUDA device (-1: on the host). What is made of it keeps ``owner``."""

class GpuMemory:
    """Symmetric memory: one allocation of every rank, all mapped here, zero when made."""

    @staticmethod
    def virtual_ranks(device: int, world_size: int, bytes: int) -> GpuMemory: ...
    @staticmethod
    def processes(communicator: HostCommunicator, device: int, bytes: int, timeout_s: float) -> GpuMemory:
        """Collective; passes CUDA's handles over the communicator's sockets."""

    @staticmethod
    def window(window: NcclWindow, device: int) -> GpuMemory:
        """What an open window has; clears this rank's part. No rank may use it before all have come back."""

    @staticmethod
    def borrowed(parts: Sequence[int], bytes: int) -> GpuMemory:
        """Parts that the caller keeps: peers played by other memory, for measurements."""

    @property
    def provider(self) -> str: ...
    @property
    def world_size(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def part(self, rank: int, /) -> int: ...

class RankGroup:
    """The ranks of a group whose kernels this process launches, on a stream each; csrc/cuda/runtime/rank_group.hpp."""

    def __init__(self, pads: GpuMemory, device: int, local_ranks: Sequence[int], timeout_s: float) -> None: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_ranks(self) -> list[int]: ...
    def stream(self, rank: int, /) -> int: ...
    def fork(self, caller: int, /) -> None: ...
    def join(self, caller: int, /) -> None: ...
    def check(self) -> None: ...
    def wait(self, timeout_s: float) -> None: ...
    def abort(self) -> None: ...
    def abort_word(self, rank: int, /) -> int: ...
    def status(self, rank: int, /) -> int: ...
    @staticmethod
    def staging_bytes(wire: str, count: int, chunk: int, grid: tuple[int, int]) -> int:
        """Of each rank, for a one-shot all-reduce."""

    # ``stream`` None: the rank's own.
    def all_reduce_one_shot(
        self,
        rank: int,
        dtype: str,
        wire: str,
        op: str,
        count: int,
        chunk: int,
        input: int,
        output: int,
        staging: Sequence[int],
        staging_bytes: int,
        grid: tuple[int, int],
        stream: int | None = None,
    ) -> None: ...
    def all_reduce_two_shot(
        self,
        rank: int,
        dtype: str,
        op: str,
        count: int,
        data: Sequence[int],
        squares: Sequence[int],
        grid: tuple[int, int],
        stream: int | None = None,
    ) -> None: ...
    def reduce_scatter(
        self,
        rank: int,
        dtype: str,
        output_dtype: str,
        op: str,
        count: int,
        inputs: Sequence[int],
        output: int,
        squares: Sequence[int],
        grid: tuple[int, int],
    ) -> None: ...
    def all_gather(self, rank: int, input: int, bytes: int, outputs: Sequence[int], grid: tuple[int, int]) -> None: ...
    def put(
        self, rank: int, peer: int, input: int, bytes: int, slots: Sequence[int], grid: tuple[int, int]
    ) -> None: ...
    def get(
        self, rank: int, peer: int, output: int, bytes: int, slots: Sequence[int], grid: tuple[int, int]
    ) -> None: ...
    def bucket(
        self,
        rank: int,
        gather: bool,
        tensor_dtype: str,
        bucket_dtype: str,
        table: tuple[int, int, int, int],
        bucket: int,
        scale: float,
        accumulate: bool,
        squares: int,
        non_finite: int,
        grid: tuple[int, int],
    ) -> None: ...
    def norm(self, rank: int, squares: int, num_squares: int, max_norm: float, result: int) -> None: ...
    def sharded_adamw(
        self,
        rank: int,
        grad_dtype: str,
        param_dtype: str,
        count: int,
        grads: Sequence[int],
        average: bool,
        state: Sequence[int],
        parameters: Sequence[int],
        options: tuple[float, float, float, float, float, int],
        clip: int,
        grid: tuple[int, int],
    ) -> None: ...

def matmul_plan(
    op: str, rank: int, rows: Sequence[int], num_pieces: int, num_lanes: int, mapped: bool
) -> list[dict[str, Any]]:
    """What one rank does in one overlapped product, as data; csrc/cuda/matmul/plan.hpp."""

def matmul_workspace_bytes(capacity: tuple[int, int, int, int], world_size: int) -> int:
    """Of symmetric memory. ``capacity``: rows of all ranks, of one; bytes of a row of x, of the result."""

class CublasLt:
    """Products by cuBLASLt, one after the other: (x, weight, out) with out = x @ weight.T."""

    def __init__(self, device: int, names: Sequence[str], workspace_bytes: int) -> None: ...
    def multiply(
        self,
        dtype: str,
        rows: int,
        in_features: int,
        out_features: int,
        tensors: tuple[int, int, int],
        stream: int,
    ) -> None: ...

class OverlappedMatmul:
    def __init__(
        self,
        memory: GpuMemory,
        device: int,
        local_ranks: Sequence[int],
        capacity: tuple[int, int, int, int],
        cublaslt: Sequence[str],
        num_pieces: int,
        num_lanes: int,
        num_multiprocessors: int,
        reduce_blocks: int,
        workspace_bytes: int,
    ) -> None: ...
    def enqueue(
        self,
        op: str,
        dtype: str,
        rows: Sequence[int],
        in_features: int,
        out_features: int,
        transposed: bool,
        one_by_one: bool,
        tensors: Sequence[tuple[int, int, int]],
        caller: int,
    ) -> None: ...
    def gathered(self) -> int: ...
    def wait(self, timeout_s: float) -> None: ...
