"""Optimizer states: saved at one world size and stage, loaded at another, and in torch's own AdamW."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import pycomm
from pycomm.checkpoints import Part
from pycomm.data_parallel import DataParallel, ShardedAdamW
from pycomm.errors import PycommError
from pycomm.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from tests.data_parallel.helpers import bits, message_of
from tests.data_parallel.training import loss_on, network, train, weight_bits
from tests.torch_backend.helpers import torch_distributed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("saved", "loaded"), [((2, 1), (3, 2)), ((4, 2), (1, 0)), ((1, 0), (4, 1)), ((3, 1), (2, 1))])
def test_states_load_at_another_world_size_and_stage(pool, tmp_path, saved, loaded, dtype):
    pool.run(saved[0], save, saved[1], dtype, str(tmp_path / "checkpoint"))
    # Every rank trains on the same rows from here on, so that world sizes agree but for the division by 3.
    results = {
        world_size: pool.run(world_size, go_on, stage, dtype, str(tmp_path / "checkpoint"))
        for world_size, stage in (loaded, (1, 0))
    }
    (want,) = results[1][:1]
    assert all(result[0] == want[0] for result in results[loaded[0]])  # the states, bit for bit
    if loaded[0] != 3:
        assert all(result[1] == want[1] for result in results[loaded[0]])  # the weights after two more steps


def save(comm, stage, dtype, path):
    ddp, optimizer, _ = train(comm, stage, num_steps=3, dtype=dtype)
    state = {"model": ddp.state_dict(), "optimizer": optimizer.state_dict()}  # collective
    if comm.rank == 0:
        torch.save(state, path)


def go_on(comm, stage, dtype, path):
    state = torch.load(path)
    ddp = DataParallel(network(dtype), comm)
    ddp.load_state_dict(state["model"])
    optimizer = ShardedAdamW(ddp, stage=stage)
    optimizer.load_state_dict(state["optimizer"])
    whole = optimizer.state_dict()["state"]
    loaded = {(key, name): bits(value) for key, entry in whole.items() for name, value in entry.items()}
    for step in range(2):
        optimizer.zero_grad()
        loss_on(ddp, 0, step).backward()
        optimizer.step()
    return loaded, weight_bits(ddp)


def test_one_rank_alone_gets_whole_states(pool):
    assert pool.run(3, states_on_rank_1) == [(0, False), (6, True), (0, False)]


def states_on_rank_1(comm):
    """How many parameters' states there are, and whether they are those that every rank can have."""
    _, optimizer, _ = train(comm, 1, num_steps=2)
    everywhere, here = (optimizer.state_dict(root)["state"] for root in (None, 1))
    is_equal = here.keys() == everywhere.keys() and all(
        bits(value) == bits(everywhere[key][name]) for key, entry in here.items() for name, value in entry.items()
    )
    return len(here), is_equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("saved", "loaded"), [((2, 1), (3, 2)), ((4, 2), (1, 0)), ((1, 0), (2, 1)), ((3, 2), (2, 1))])
def test_each_rank_writes_and_reads_its_own_states(pool, tmp_path, saved, loaded, dtype):
    folder, stores = str(tmp_path / "checkpoint"), [str(tmp_path / name) for name in ("store", "other_store")]
    (want, *others) = pool.run(saved[0], save_sharded, saved[1], dtype, folder, stores[0])
    assert all(other == want for other in others)
    assert pool.run(loaded[0], load_sharded, loaded[1], dtype, folder, stores[1]) == [want] * loaded[0]


def save_sharded(comm, stage, dtype, folder, store):
    ddp, optimizer, _ = train(comm, stage, num_steps=3, dtype=dtype)
    with torch_distributed(comm, "pycomm", store):
        dcp.save({"model": ddp.state_dict(), "optimizer": optimizer.sharded_states()}, checkpoint_id=folder)
    return everything(ddp, optimizer)


def load_sharded(comm, stage, dtype, folder, store):
    ddp = DataParallel(network(dtype), comm)
    optimizer = ShardedAdamW(ddp, lr=7.0, stage=stage)  # the checkpoint has another rate
    with torch.no_grad():
        for param in ddp.parameters():
            param.zero_()
    with torch_distributed(comm, "pycomm", store):
        model = ddp.state_dict()
        dcp.load({"model": model, "optimizer": optimizer.sharded_states()}, checkpoint_id=folder)
    ddp.load_state_dict(model)
    return everything(ddp, optimizer)


def everything(ddp, optimizer):
    """Weights, states and settings. Collective."""
    whole = optimizer.state_dict()
    states = {(key, name): bits(value) for key, entry in whole["state"].items() for name, value in entry.items()}
    return weight_bits(ddp), states, whole["param_groups"]


def test_a_checkpoint_of_another_model_is_refused(pool, tmp_path):
    arguments = [str(tmp_path / name) for name in ("checkpoint", "store")]
    assert pool.run(2, refusal_of_another_model, *arguments) == [True] * 2


def refusal_of_another_model(comm, folder, store):
    optimizer = ShardedAdamW(DataParallel(torch.nn.Linear(30, 30), comm))
    other = ShardedAdamW(DataParallel(torch.nn.Linear(30, 60), comm))
    with torch_distributed(comm, "pycomm", store):
        dcp.save({"optimizer": optimizer.sharded_states()}, checkpoint_id=folder)
        load = partial(dcp.load, {"optimizer": other.sharded_states()}, checkpoint_id=folder)
        return "Size mismatch" in message_of(CheckpointException, load)


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_a_checkpoint_of_a_divided_model_is_refused(pool, tmp_path, axis):
    """Catches weights and states that are lost since ranks save different tensors under one name."""
    for outcomes in pool.run(4, outcomes_over_a_mesh, axis, str(tmp_path)):
        for what, outcome in outcomes.items():
            assert "0.weight" in outcome, (what, outcome)
            assert "torch.save(" in outcome, (what, outcome)


def outcomes_over_a_mesh(comm, axis, folder):
    """What the recipe for one axis says or gives back, of weights and states, of states alone, of weights alone."""
    with pycomm.Mesh(comm, dp=2, **{axis: 2}) as mesh, torch_distributed(comm, "pycomm", f"{folder}/store"):
        ddp, optimizer = divided(mesh)
        save_place(mesh, ddp, optimizer, folder)
        assert load_place(mesh, folder) == everything(ddp, optimizer)
        model = ddp.module
        recipes = {
            "all": lambda: {"model": ddp.state_dict(), "optimizer": optimizer.sharded_states()},
            "states": lambda: {"optimizer": optimizer.sharded_states()},
            "weights": lambda: {"model": ddp.state_dict()},
        }
        if axis == "tp":
            recipes["plain model"] = lambda: {"model": model.state_dict()}
        return {what: outcome_of(recipe, ddp, optimizer, f"{folder}/{what}") for what, recipe in recipes.items()}


def dcp_save(state, folder):
    dcp.save(state, checkpoint_id=folder)


def divided(mesh):
    """A model of this rank's part, or stage, trained for a step."""
    torch.manual_seed(mesh.pp_rank)
    layers = ColumnParallelLinear(8, 2000, mesh.tp), torch.nn.Tanh(), RowParallelLinear(2000, 8, mesh.tp)
    ddp = DataParallel(torch.nn.Sequential(*layers), mesh.dp)
    optimizer = ShardedAdamW(ddp, stage=1)
    ddp(torch.full((2, 8), 1.0 + mesh.dp_rank)).sum().backward()
    optimizer.step()
    return ddp, optimizer


def outcome_of(recipe, ddp, optimizer, folder, save=dcp_save):
    """The error of saving with the recipe, or what comes back with other bits."""
    try:
        save(recipe(), folder)
    except (CheckpointException, PycommError) as error:
        return str(error)
    before = everything(ddp, optimizer)
    with torch.no_grad():
        for tensor in (*ddp.parameters(), *(t for _, _, states in optimizer.shards() for t in states.values())):
            tensor.zero_()
    state = recipe()
    try:
        dcp.load(state, checkpoint_id=folder)
    except CheckpointException as error:
        return f"saved, and does not load: {error}"
    if "model" in state:
        ddp.load_state_dict(state["model"])
    after = everything(ddp, optimizer)
    names = [f"weights {name}" for name in before[0] if before[0][name] != after[0][name]]
    return f"came back wrong: {names + [f'state {key}' for key in before[1] if before[1][key] != after[1][key]]}"


def save_place(mesh, ddp, optimizer, folder):
    """What the error says to do."""
    state = {"model": ddp.state_dict(), "optimizer": optimizer.state_dict(root=0)}
    if mesh.dp_rank == 0:
        torch.save(state, f"{folder}/pp{mesh.pp_rank}-tp{mesh.tp_rank}.pt")
    mesh.comm.barrier()


def load_place(mesh, folder):
    """All that another optimizer and its model have after loading the file of their place."""
    fresh, fresh_optimizer = divided(mesh)
    state = torch.load(f"{folder}/pp{mesh.pp_rank}-tp{mesh.tp_rank}.pt")
    with torch.no_grad():
        for param in fresh.parameters():
            param.zero_()
    fresh.load_state_dict(state["model"])
    fresh_optimizer.load_state_dict(state["optimizer"])
    return everything(fresh, fresh_optimizer)


def test_parts_are_plain_tensors_to_everybody_else(pool):
    """Catches copies, files and models that get the type that the checkpoint refuses."""
    assert pool.run(2, types_made_of_parts) == [{torch.Tensor}] * 2


def types_made_of_parts(comm):
    layer, other = ColumnParallelLinear(8, 8, comm), ColumnParallelLinear(8, 8, comm)
    state = layer.state_dict()
    assert type(state["weight"]) is Part
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    copies = [copy.deepcopy(state), torch.load(file), pickle.loads(pickle.dumps(state))]
    for found in (state, *copies):
        other.load_state_dict(found)
        other.load_state_dict(found, assign=True)
        assert torch.equal(other.weight, layer.weight)
        assert type(other.weight) is torch.nn.Parameter
        assert other.weight.is_part
    made = [value for found in copies for value in found.values()]
    return {type(value) for value in (*made, state["weight"] + 1, state["weight"][0], state["weight"].clone())}


def test_a_checkpoint_without_torchs_process_group_is_refused(pool, tmp_path):
    """Catches that all ranks write one file, of which the last one's states are left."""
    for outcome in pool.run(2, outcome_without_process_group, str(tmp_path / "checkpoint")):
        assert "'0.weight'" in outcome, outcome
        assert "init_process_group" in outcome, outcome


def outcome_without_process_group(comm, folder):
    ddp, optimizer, _ = train(comm, 1, num_steps=1)
    recipe = partial(recipe_of, ddp, optimizer)
    return outcome_of(recipe, ddp, optimizer, folder, partial(save_one_after_the_other, comm))


def recipe_of(ddp, optimizer):
    return {"model": ddp.state_dict(), "optimizer": optimizer.sharded_states()}


def save_one_after_the_other(comm, state, folder):
    for rank in range(comm.world_size):
        if comm.rank == rank:
            dcp.save(state, checkpoint_id=folder)
        comm.barrier()


def test_torch_loads_it(pool):
    assert pool.run(2, torch_loads_it) == [True] * 2


def torch_loads_it(comm):
    ddp, optimizer, _ = train(comm, 1, num_steps=2)
    theirs = torch.optim.AdamW(p for p in network().parameters() if p.requires_grad)
    theirs.load_state_dict(optimizer.state_dict())
    entries = list(theirs.state_dict()["state"].values())
    return float(entries[0]["step"]) == 2 and len(entries) == len(list(ddp.module.parameters())) - 1
