"""pycomm's kernels on one GPU beside what torch has, as shares of the copy bandwidth measured in the same run.

python benchmarks/gpu_kernels.py --json rows.jsonl
"""

from __future__ import annotations

import torch
from gpu_timing import Row, captured, copy_bytes_per_ms, main, times_ms

from pycomm.gpu import Bucket, KernelRanks

ADAMW = (1e-4, 0.9, 0.95, 1e-8, 0.1, 10)  # lr, beta1, beta2, eps, weight decay, step
TIMEOUT_S = 5.0
NUM_PARAMETERS = 1 << 26


def bucket() -> list[Row]:
    """float32 gradients of a GPT's shapes, averaged over 8 ranks, into a bfloat16 bucket: 6 bytes an element."""
    shapes = [(4096, 4096)] * 3 + [(4096,)] * 6 + [(1024, 4096)] * 4 + [(50_000,), (13,)]
    tensors = [torch.randn(shape, device="cuda") for shape in shapes]
    flat = Bucket(tensors, torch.bfloat16)
    ranks = KernelRanks.virtual(1)

    def ours() -> None:
        ranks.bucket_gather(flat, 0.125)

    def torchs() -> torch.Tensor:
        return torch.cat([tensor.view(-1) for tensor in tensors]).div_(8).to(torch.bfloat16)

    ours()
    wanted = torchs()
    ranks.synchronize()
    assert torch.equal(flat.memory, wanted), "the bucket is not what torch makes"
    time, other = times_ms([captured(ours), captured(torchs)])
    share = 6 * flat.memory.numel() / time / copy_bytes_per_ms()
    detail = f"{flat.memory.numel():,} elements, {time * 1e3:.0f} µs, torch {other * 1e3:.0f} µs"
    return [
        Row("bucket gather, scale and cast: share of copy bandwidth", 100 * share, "%", "≥ 90 %", share >= 0.9, detail),
        Row("the same against torch's cat, div and to", other / time, "x", "≥ 3 x", other / time >= 3, detail),
    ]


def adamw() -> list[Row]:
    """float32 parameters, no master copy: 28 bytes a parameter, against torch.optim.AdamW(fused=True)."""
    ranks = KernelRanks.virtual(1)
    param, grad = torch.randn(NUM_PARAMETERS, device="cuda"), torch.randn(NUM_PARAMETERS, device="cuda")
    moments = torch.zeros_like(param), torch.zeros_like(param)
    theirs = torch.nn.Parameter(param.clone())
    theirs.grad = grad.clone()
    lr, beta1, beta2, eps, weight_decay, _ = ADAMW
    optimizer = torch.optim.AdamW(
        [theirs], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True, capturable=True
    )

    def ours() -> None:
        ranks.sharded_adamw([param], [grad], [(None, *moments)], ADAMW)

    ours()
    ranks.synchronize()
    time, other = times_ms([captured(ours), captured(optimizer.step)])
    share = 28 * NUM_PARAMETERS / time / copy_bytes_per_ms()
    detail = f"{NUM_PARAMETERS:,} parameters, {time * 1e3:.0f} µs, torch {other * 1e3:.0f} µs"
    return [
        Row("fused AdamW: share of copy bandwidth", 100 * share, "%", "≥ 88 %", share >= 0.88, detail),
        Row("the same against torch's fused=True", other / time, "x", "≥ 1 x", other / time >= 1, detail),
    ]


def all_reduce() -> list[Row]:
    """Virtual ranks: n ranks load and store S bytes each, 2·n·S in all."""
    rows, bandwidth = [], copy_bytes_per_ms()
    for world in (2, 4, 8):
        ranks = KernelRanks.virtual(world, timeout_s=TIMEOUT_S)
        for num_bytes in (1 << 20, 1 << 24, 1 << 28):
            tensors = [torch.zeros(num_bytes // 4, device="cuda") for _ in range(world)]

            def work(ranks: KernelRanks = ranks, tensors: list[torch.Tensor] = tensors) -> None:
                ranks.all_reduce(tensors)

            work()
            ranks.synchronize()
            (time,) = times_ms([captured(work)])
            ranks.synchronize()
            share = 2 * world * num_bytes / time / bandwidth
            large = num_bytes == 1 << 28
            name = f"all-reduce of {world} virtual ranks, {num_bytes >> 20} MiB: 2·n·S over copy bandwidth"
            target = ("≥ 85 %", share >= 0.85) if large else ("", None)
            rows.append(Row(name, 100 * share, "%", *target, f"{time * 1e3:.0f} µs"))
    return rows


def one_shot() -> list[Row]:
    """8 KB in a CUDA graph of 20 calls, one after the other."""
    rows, calls = [], 20
    for world in (2, 4, 8):
        ranks = KernelRanks.virtual(world, timeout_s=TIMEOUT_S)
        for num_bytes in (1 << 10, 1 << 13, 1 << 16):
            tensors = [torch.zeros(num_bytes // 4, device="cuda") for _ in range(world)]

            def work(ranks: KernelRanks = ranks, tensors: list[torch.Tensor] = tensors) -> None:
                ranks.all_reduce_one_shot(tensors, tensors)

            work()
            ranks.synchronize()
            (time,) = times_ms([captured(work, calls)])
            ranks.synchronize()
            microseconds = time / calls * 1e3
            name = f"one-shot all-reduce of {world} virtual ranks, {num_bytes >> 10} KiB, in a CUDA graph"
            target = ("< 10 µs", microseconds < 10) if num_bytes == 1 << 13 else ("", None)
            rows.append(Row(name, microseconds, "µs", *target))
    return rows


def zero_step() -> list[Row]:
    """bfloat16 gradients and parameters, fp32 states: the fused step against its three parts one after the other."""
    world = 4
    ranks = KernelRanks.virtual(world, timeout_s=TIMEOUT_S)
    part = NUM_PARAMETERS // world
    grads, params, other_params = (
        [torch.randn(NUM_PARAMETERS, device="cuda").bfloat16() for _ in range(world)] for _ in range(3)
    )
    states = [tuple(torch.zeros(part, device="cuda") for _ in range(3)) for _ in range(world)]
    reduced = [torch.empty(part, device="cuda") for _ in range(world)]
    shards = [torch.empty(part, device="cuda", dtype=torch.bfloat16) for _ in range(world)]
    alone = KernelRanks.virtual(1)

    def fused() -> None:
        ranks.sharded_adamw(params, grads, states, ADAMW)

    def separate() -> None:
        ranks.reduce_scatter(reduced, grads, "avg")
        for rank in range(world):
            alone.sharded_adamw([shards[rank]], [reduced[rank]], [states[rank]], ADAMW)
        ranks.all_gather(other_params, shards)

    fused()
    separate()
    ranks.synchronize()
    time, other = times_ms([captured(fused), captured(separate)])
    detail = f"{world} virtual ranks, {NUM_PARAMETERS:,} parameters, {time * 1e3:.0f} µs, separate {other * 1e3:.0f} µs"
    return [Row("fused ZeRO step against its three parts", other / time, "x", "≥ 1.5 x", other / time >= 1.5, detail)]


if __name__ == "__main__":
    main([bucket, adamw, all_reduce, one_shot, zero_step])
