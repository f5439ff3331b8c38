"""Weights of a cut model and files: reading only what this rank needs, writing the whole, sharded checkpoints.

safetensors is asked for slices, so a rank reads its part of each tensor and no more. Sharded checkpoints are
torch.distributed.checkpoint's: parameters become DTensors, and it puts together the pieces of another number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycomm.communicator import Communicator
from pycomm.tensor_parallel.parallelize import shards_of
from pycomm.tensor_parallel.shards import Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["full_state_dict", "load_safetensors", "meta_parameters", "sharded_state_dict"]


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Parameters of modules made inside are on the meta device, for :func:`load_safetensors`; buffers are real.

    ``torch.device("meta")`` would leave buffers that checkpoints do not have, such as rotary frequencies, without
    values. Each parameter exists for a moment. Replaces ``nn.Module.register_parameter`` meanwhile, for all threads.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@torch.no_grad()
def load_safetensors(model: nn.Module, directory: str | Path) -> None:
    """Fill a cut model from a local checkpoint directory of safetensors files; no communication.

    Parameters may be on the meta device (:func:`meta_parameters`): they are made. Names may lack or have the model's
    ``base_model_prefix`` in front, and one of several tied names is enough.

    Args:
        directory: has ``model.safetensors`` or ``model.safetensors.index.json`` and the files that it names.

    Raises:
        FileNotFoundError: it has neither.
        ValueError: a parameter is missing, or has another shape; a buffer has no values here and is not in the files.
        ImportError: safetensors is not installed.
    """
    from safetensors import safe_open

    folder = Path(directory)
    files = _files(folder)
    shards = shards_of(model)
    prefix = getattr(model, "base_model_prefix", "") + "."
    names: dict[int, list[str]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    optional = {name for name, _ in model.named_buffers()}
    for same in names.values():
        spellings = [s for name in same for s in (name, name.removeprefix(prefix), prefix + name)]
        key = next((spelling for spelling in spellings if spelling in files), None)
        if key is None:
            if same[0] in optional and not tensors[same[0]].is_meta:
                continue  # buffers are often not saved
            if same[0] in optional:
                raise ValueError(
                    f"buffer {same[0]} is on the meta device and {folder} has no tensor for it: make the model under "
                    f"pycomm.tensor_parallel.meta_parameters(), which leaves buffers their values"
                )
            raise ValueError(f"{folder} has no tensor for {' or '.join(same)}")
        with safe_open(folder / files[key], framework="pt") as file:
            part = _read(file.get_slice(key), shards.get(same[0]))
        _assign(model, same, tensors[same[0]], part)


def full_state_dict(model: nn.Module, *, root: int | None = 0) -> dict[str, Tensor]:
    """The state_dict of the model as it was before it was cut, on the CPU. Collective, one parameter at a time.

    Args:
        root: the rank that gets it, the others get an empty one; None: every rank.
    """
    shards = shards_of(model)
    keeps = root is None or all(comm.rank == root for _, comm in shards.values())
    whole: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in done:
            value = tensor.detach()
            full = _gather(value, *shards[name]) if name in shards else value.clone()
            done[id(tensor)] = full.cpu() if keeps else value
        if keeps:
            whole[name] = done[id(tensor)]
    return whole


def sharded_state_dict(model: nn.Module, mesh: DeviceMesh) -> dict[str, Any]:
    """Parameters and buffers for torch.distributed.checkpoint: those that are cut as DTensors over ``mesh``.

    They share memory with the parameters, so that loading into them loads the model; no communication. A parameter
    whose segments are cut each for itself (GPT-2's query, key and value in one) has one entry a segment, ``name#0``
    and so on. A dimension that is cut in units (heads) is two, so that DTensor's rule never cuts one.

    Args:
        mesh: one-dimensional, over the ranks of the communicator that the model is cut over, in their order.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Placement

    shards = shards_of(model)
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = tensor.detach()
        if name not in shards:
            found[name] = value
            continue
        shard, _ = shards[name]
        assert shard.dim is not None
        for i, segment in enumerate(value.chunk(shard.segments, shard.dim)):
            part = segment
            if shard.unit > 1:
                part = part.unflatten(shard.dim, (part.shape[shard.dim] // shard.unit, shard.unit))
            shape = list(part.shape)
            shape[shard.dim] = shard.total // shard.segments // shard.unit
            stride = torch.empty(shape, device="meta").stride()
            key = name if shard.segments == 1 else f"{name}#{i}"
            found[key] = DTensor.from_local(
                part, mesh, [Placement(shard.dim)], run_check=False, shape=torch.Size(shape), stride=stride
            )
    return found


def _files(folder: Path) -> Mapping[str, str]:
    """Tensor name -> file name."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return weight_map
    single = folder / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single.name)


def _read(view: Any, cut: tuple[Shard, Communicator] | None) -> Tensor:
    """This rank's part of a tensor in a file."""
    if cut is None:
        whole: Tensor = view[...]
        return whole
    shard, comm = cut
    assert shard.dim is not None
    if view.get_shape()[shard.dim] != shard.total:
        raise ValueError(f"the file has a tensor of {view.get_shape()}, dimension {shard.dim} shall be {shard.total}")
    lead = (slice(None),) * shard.dim

    def rows(start: int, size: int) -> Tensor:
        index = (*lead, slice(start, start + size))
        found: Tensor = view[index]
        return found

    intervals = shard.intervals(comm.world_size, comm.rank)
    parts = [rows(start, size) for start, size in intervals if size]
    if parts:
        return torch.cat(parts, shard.dim)
    return rows(0, 1).narrow(shard.dim, 0, 0)


def _assign(model: nn.Module, names: list[str], old: Tensor, part: Tensor) -> None:
    if part.shape != old.shape:
        raise ValueError(f"{names[0]} is {tuple(old.shape)} here, {tuple(part.shape)} in the checkpoint")
    if not old.is_meta:
        old.copy_(part)
        return
    new = part.to(old.dtype)
    made = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for name in names:
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, own_name, made)


def _gather(value: Tensor, shard: Shard, comm: Communicator) -> Tensor:
    assert shard.dim is not None
    sizes = [shard.size(comm.world_size, rank) for rank in range(comm.world_size)]
    shapes = [(*value.shape[: shard.dim], size, *value.shape[shard.dim + 1 :]) for size in sizes]
    counts = [torch.Size(shape).numel() for shape in shapes]
    flat = value.new_empty(sum(counts))
    comm.all_gather(flat, value.contiguous(), output_splits=counts)
    full = value.new_empty(*value.shape[: shard.dim], shard.total, *value.shape[shard.dim + 1 :])
    for rank, piece in enumerate(flat.split(counts)):
        part = piece.view(shapes[rank])
        intervals = shard.intervals(comm.world_size, rank)
        for (start, size), segment in zip(intervals, part.chunk(shard.segments, shard.dim), strict=True):
            full.narrow(shard.dim, start, size).copy_(segment)
    return full
