"""Overlapped products on one GPU: what chunks cost, and how much of a communication is hidden.

    python benchmarks/gpu_matmul.py --json rows.jsonl

The peers of rank 0 of 4 are played by pinned host memory, with all their flags set: rows then come and go by copy
engine at the speed of the bus, as they do between GPUs, and take no multiprocessor from the product.
"""

from __future__ import annotations

import torch
from gpu_timing import Row, main, times_ms

from pycomm import _C
from pycomm.gpu.matmul import cublaslt_names

WORLD, ROWS = 4, 2048  # of each rank: M = 8192
WORKSPACE_BYTES = 32 << 20
FLAG_WORDS = 2 * 16
SHARDS = 256  # where the buffers of a workspace begin (csrc/cuda/matmul/workspace.hpp)
SET = 1 << 30  # ahead of every value that a call waits for


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class Product:
    """x [M, K] @ weight [N, K].T of bfloat16 by the library that overlapped products use."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.sizes = (in_features, out_features)
        self.x = torch.randn(WORLD * ROWS, in_features, device="cuda").bfloat16()
        self.weight = torch.randn(out_features, in_features, device="cuda").bfloat16()
        self.out = torch.empty(WORLD * ROWS, out_features, device="cuda", dtype=torch.bfloat16)
        self._core = _C.CublasLt(torch.cuda.current_device(), list(cublaslt_names()), WORKSPACE_BYTES)

    def run(self, num_chunks: int = 1) -> None:
        for x, out in zip(self.x.chunk(num_chunks), self.out.chunk(num_chunks), strict=True):
            addresses = (x.data_ptr(), self.weight.data_ptr(), out.data_ptr())
            self._core.multiply("bfloat16", len(x), *self.sizes, addresses, stream())


def chunks() -> list[Row]:
    product = Product(8192, 8192)
    product.run()
    wanted = product.x.double() @ product.weight.double().T
    assert (product.out.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max(), "the product is wrong"
    del wanted
    whole, cut = times_ms([product.run, lambda: product.run(4)])
    tflops = 2 * WORLD * ROWS * 8192 * 8192 / whole / 1e9
    detail = f"{whole * 1e3:.0f} µs ({tflops:.0f} TFLOP/s) in one call, {cut * 1e3:.0f} µs in four"
    extra = 100 * (cut / whole - 1)
    return [Row("a product of M = 8192 in 4 chunks: longer than one call by", extra, "%", "≤ 5 %", extra <= 5, detail)]


class PlayedPeers:
    """Rank 0 of 4, alone: its part of the workspace on the GPU, the others' in pinned host memory."""

    def __init__(self, product: Product) -> None:
        in_features, out_features = product.sizes
        capacity = (WORLD * ROWS, ROWS, 2 * in_features, 2 * out_features)
        num_bytes = _C.matmul_workspace_bytes(capacity, WORLD)
        self.parts = [torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")]
        self.parts += [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(WORLD - 1)]
        self.parts[0][: 4 * FLAG_WORDS].view(torch.int32).fill_(SET)
        rows = product.x.view(torch.uint8).view(WORLD, -1).cpu()
        for part, shard in zip(self.parts[1:], rows[1:], strict=True):  # both sets of shards, which follow the flags
            part[SHARDS : SHARDS + 2 * shard.numel()] = shard.repeat(2)
        memory = _C.GpuMemory.borrowed([part.data_ptr() for part in self.parts], num_bytes)
        self.shard_bytes = 2 * ROWS * in_features
        self.partial_bytes = 2 * ROWS * out_features
        self._core = _C.OverlappedMatmul(
            memory, torch.cuda.current_device(), [0], capacity, list(cublaslt_names()), 1, WORLD, 0, 64, WORKSPACE_BYTES
        )

    def run(self, op: str, product: Product, x: torch.Tensor, out: torch.Tensor) -> None:
        addresses = [(x.data_ptr(), product.weight.data_ptr(), out.data_ptr())]
        self._core.enqueue(op, "bfloat16", [ROWS] * WORLD, *product.sizes, False, False, addresses, stream())

    def copies(self, num_bytes: int, to_peers: bool) -> None:
        """The same bytes, one after the other, and nothing beside them."""
        for part in self.parts[1:]:
            source, target = (self.parts[0], part) if to_peers else (part, self.parts[0])
            target[SHARDS : SHARDS + num_bytes].copy_(source[SHARDS : SHARDS + num_bytes], non_blocking=True)


def hidden(op: str, in_features: int, out_features: int) -> list[Row]:
    product = Product(in_features, out_features)
    peers = PlayedPeers(product)
    gathers = op == "all_gather_matmul"
    x = product.x[:ROWS] if gathers else product.x
    out = product.out if gathers else product.out[:ROWS]
    num_bytes = peers.shard_bytes if gathers else peers.partial_bytes

    def overlapped() -> None:
        peers.run(op, product, x, out)

    def copies() -> None:
        peers.copies(num_bytes, not gathers)

    def in_turn() -> None:
        copies()
        product.run()

    fused, alone, moving, sequence = times_ms([overlapped, product.run, copies, in_turn])
    share = (sequence - fused) / (sequence - alone)
    detail = (
        f"overlapped {fused * 1e3:.0f} µs, product {alone * 1e3:.0f} µs, {3 * num_bytes >> 20} MiB "
        f"{moving * 1e3:.0f} µs, in turn {sequence * 1e3:.0f} µs"
    )
    return [Row(f"{op}: communication hidden", 100 * share, "%", "≥ 80 %", share >= 0.8, detail)]


def all_gather_matmul() -> list[Row]:
    return hidden("all_gather_matmul", 8192, 28672)


def matmul_reduce_scatter() -> list[Row]:
    return hidden("matmul_reduce_scatter", 28672, 8192)


if __name__ == "__main__":
    main([chunks, all_gather_matmul, matmul_reduce_scatter])
