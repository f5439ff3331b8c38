"""Every kernel once, small, for compute-sanitizer: ``compute-sanitizer --tool memcheck python -m tests.gpu.sanitized``.

A sanitizer may run one kernel at a time, and kernels of virtual ranks wait for each other. So the ranks' barriers are
passed in advance: their flags are set far ahead. Every rank writes nothing but its own part of anything between two
barriers, so results are right all the same, but for one-shot all-reduce, which is run and not compared.
"""

from __future__ import annotations

import torch

from pycomm import _C
from pycomm.gpu import Bucket, KernelRanks
from pycomm.gpu.memory import tensors_of

WORLD, COUNT = 4, 4 * 2048
AHEAD = 1 << 20
BARRIER_FLAGS = 128 * 16  # the first array of SignalPad: kMaxBlocks * kMaxRanks


def ranks_that_never_wait() -> KernelRanks:
    device = torch.device("cuda", torch.cuda.current_device())
    pads = _C.GpuMemory.virtual_ranks(device.index, WORLD, _C.SIGNAL_PAD_BYTES)
    for flags in tensors_of(pads, device, (BARRIER_FLAGS,), torch.int32):
        flags.fill_(AHEAD)
    return KernelRanks(pads, device, range(WORLD), timeout_s=60.0)


def expect(what: str, tensors: list[torch.Tensor], value: float) -> None:
    for tensor in tensors:
        if not bool(tensor.eq(value).all()):
            raise SystemExit(f"{what}: {tensor.unique().tolist()[:4]} instead of {value}")


def collectives(ranks: KernelRanks, dtype: torch.dtype) -> None:
    def filled(num: int, value: float = 1) -> list[torch.Tensor]:
        # One element behind a 16-byte boundary: the paths of misaligned tensors, too.
        return [torch.full((num + 1,), value, device="cuda").to(dtype)[1:] for _ in range(WORLD)]

    two_shot, parts, outputs = filled(COUNT + 13), filled(COUNT // WORLD), filled(COUNT)
    squares = [torch.zeros(COUNT // 1024 + 1, dtype=torch.float64, device="cuda") for _ in range(WORLD)]
    ranks.all_reduce(two_shot, squares=squares)
    ranks.reduce_scatter(parts, filled(COUNT), "max", squares=squares)
    ranks.all_gather(outputs, parts)
    small = filled(1000)
    ranks.all_reduce_one_shot(small, small)
    inputs, received = filled(5000, 3), filled(5000)
    slots = [torch.empty(2, 8 * 5000, dtype=torch.uint8, device="cuda") for _ in range(WORLD)]
    ranks.shift(received, inputs, slots)
    ranks.synchronize(120.0)
    expect(f"all_reduce of {dtype}", two_shot, WORLD)
    expect(f"reduce_scatter and all_gather of {dtype}", outputs, 1)
    expect(f"put and get of {dtype}", received, 3)


def optimizer(ranks: KernelRanks, grad: torch.dtype, param: torch.dtype) -> None:
    bucket = Bucket([torch.ones(num, device="cuda", dtype=grad) for num in (3, 1024, 2049)], param)
    clip = torch.empty(3, device="cuda")
    ranks.bucket_gather(bucket, 0.5, accumulate=False, norm=True)
    ranks.norm(bucket.squares, 1e9, clip)
    ranks.bucket_scatter(bucket, 2.0)
    params = [torch.ones(COUNT, device="cuda", dtype=param) for _ in range(WORLD)]
    grads = [torch.ones(COUNT, device="cuda", dtype=grad) for _ in range(WORLD)]
    states = [tuple(torch.ones(COUNT // WORLD, device="cuda") for _ in range(3)) for _ in range(WORLD)]
    # A learning rate of 0 leaves the parameters as they are.
    ranks.sharded_adamw(params, grads, states, (0.0, 0.9, 0.95, 1e-8, 0.1, 1), clip=[clip] * WORLD)
    ranks.synchronize(120.0)
    expect("bucket", bucket.tensors, 1)
    expect("sharded_adamw", params, 1)


def main() -> None:
    ranks = ranks_that_never_wait()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        collectives(ranks, dtype)
    for grad, param in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
        optimizer(ranks, grad, param)
    print("every kernel ran, results are right")


if __name__ == "__main__":
    main()
