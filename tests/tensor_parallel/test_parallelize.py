"""parallelize beside whole models: plans that do not fit, tied weights, heads and ranks that do not match, files."""

import importlib.util
import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from pycomm.models import GPT, GPTConfig
from pycomm.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    auto_plan,
    full_state_dict,
    load_safetensors,
    meta_parameters,
    parallelize,
    sharded_state_dict,
)
from pycomm.tensor_parallel.heads import RepeatedHeadsLinear
from tests.pool import file_store
from tests.tensor_parallel import zoo
from tests.tensor_parallel.helpers import Seen, close, randn

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def small_gpt(**changes):
    return GPT(GPTConfig(**{"vocab_size": 11, "max_seq": 8, "num_layers": 1, "num_heads": 2, "hidden": 8} | changes))


def errors_of(comm):
    plans = {
        "nothing near": {"zzzzzz": "colwise"},
        "near": {"blocks.*.attention.querry": "colwise"},
        "style": {"blocks.*.mlp.up": "columns"},
        "type": {"blocks.*.mlp.up": "vocab"},
        "conflict": {"blocks.*.mlp.up": "colwise", "mlp.up": "rowwise"},
        "tie": {"unembedding": "rowwise"},
    }
    messages = {}
    for name, plan in plans.items():
        model = small_gpt()
        before = [type(module) for module in model.modules()]
        try:
            parallelize(model, comm, plan)
        except ValueError as error:
            messages[name] = str(error)
        assert [type(module) for module in model.modules()] == before, "unchanged"
    for plan in ("auto", "outo"):
        try:
            parallelize(nn.Sequential(nn.Linear(2, 2)), comm, plan)
        except ValueError as error:
            messages[plan] = str(error)
    return messages


def test_a_plan_that_does_not_fit_is_told(pool):
    (messages,) = pool.run(1, errors_of)
    assert "'zzzzzz' names no module of GPT; no name is near" in messages["nothing near"]
    assert "did you mean 'blocks.*.attention.query'" in messages["near"]
    assert "'columns'; it is one of colwise" in messages["style"]
    assert "'blocks.0.mlp.up' is Linear; 'vocab' takes an nn.Embedding" in messages["type"]
    assert "to be both 'colwise' and 'rowwise'" in messages["conflict"]
    assert "unembedding share a weight with token_embedding, unembedding" in messages["tie"]
    assert "Sequential has no tensor-parallel plan" in messages["auto"]
    assert '"auto" or a mapping' in messages["outo"]


def one_of_two(comm, named):
    model, whole = small_gpt(), small_gpt()
    parallelize(model, comm, {named: "vocab" if named == "token_embedding" else "colwise_gather_output"})
    assert isinstance(model.token_embedding, VocabParallelEmbedding)
    assert isinstance(model.unembedding, ColumnParallelLinear)
    assert model.unembedding.weight is model.token_embedding.weight
    ids = torch.arange(8).view(1, 8)
    for net in (model, whole):
        net(ids).square().sum().backward()
    want = model.token_embedding.shards["weight"].take(whole.token_embedding.weight.grad, comm.world_size, comm.rank)
    # Sums of 11 logits' and 8 tokens' terms, twice each (squares), through a network of ten layers.
    return close(model.token_embedding.weight.grad, want, 10 * 2 * 11 * 8)


@pytest.mark.parametrize("named", ["token_embedding", "unembedding"])
def test_a_plan_that_names_one_of_two_tied_weights(pool, named):
    assert pool.run(3, one_of_two, named) == [True] * 3


def mlp_by_plan(comm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    x = randn(4, 6, seed=1)
    want = model(x)
    parallelize(model, comm, {"0": "colwise", "2": "rowwise"})
    assert isinstance(model[0], ColumnParallelLinear)
    assert isinstance(model[2], RowParallelLinear)
    return close(model(x), want, 4 * 2 * 10)


def test_a_plan_for_a_model_of_ones_own(pool):
    assert pool.run(3, mlp_by_plan) == [True] * 3


def heads_here(comm, num_heads):
    model, whole = (
        small_gpt(num_heads=num_heads, hidden=4 * num_heads),
        small_gpt(num_heads=num_heads, hidden=4 * num_heads),
    )
    parallelize(model, comm)
    ids = torch.arange(8).view(1, 8)
    assert close(model(ids), whole(ids), 10 * 2 * 4 * 4 * num_heads)
    return model.blocks[0].attention.query.weight.shape[0] // 4


def test_heads_are_cut_by_torch_chunk_and_some_ranks_may_have_none(pool):
    assert pool.run(4, heads_here, 10) == [3, 3, 3, 1]
    assert pool.run(4, heads_here, 2) == [1, 1, 0, 0]


def key_value_layers(comm):
    layers = parallelize(zoo.build("llama"), comm).model.layers
    return type(layers[0].self_attn.k_proj) is RepeatedHeadsLinear


@needs_transformers
def test_key_value_heads_fewer_than_ranks_are_repeated(pool):
    assert pool.run(2, key_value_layers) == [False] * 2  # 10 query heads share 2: 5 and 1 a rank
    assert pool.run(4, key_value_layers) == [True] * 4


def sums_of_a_backward(comm, kind):
    model = parallelize(zoo.build(kind), comm)
    with Seen() as seen:
        loss = zoo.loss_of(model, 0)
        before = len(seen.names)
        loss.backward()
    names = [name.split(".")[1] for name in seen.names[before:]]
    return names.count("copy_matmul_backward"), names.count("reduce_from_ranks")


@needs_transformers
def test_layers_of_one_input_sum_its_gradient_once(pool):
    # Two blocks. Llama: queries, keys and values share one sum, gate and up another. GPT-2 has one matrix for each.
    # The head's gradient is summed once more.
    assert pool.run(2, sums_of_a_backward, "llama") == [(1, 4)] * 2
    assert pool.run(2, sums_of_a_backward, "gpt2") == [(5, 0)] * 2
    assert pool.run(2, sums_of_a_backward, "bert") == [(3, 2)] * 2


def refuse_attention_dropout(comm):
    model = zoo.build("gpt2")
    model.transformer.h[0].attn.attn_dropout.p = 0.5
    parallelize(model, comm)
    model.eval()
    zoo.loss_of(model, 0)
    model.train()
    try:
        zoo.loss_of(model, 0)
    except ValueError as error:
        return str(error).partition(":")[0]
    return None


@needs_transformers
def test_dropout_of_attention_weights_is_refused_in_training(pool):
    assert pool.run(1, refuse_attention_dropout) == [
        "dropout of attention weights (p=0.5) would differ between layouts"
    ]


@needs_transformers
def test_the_plan_of_hugging_face_comes_first():
    assert auto_plan(zoo.build("llama"))["layers.*.self_attn.q_proj"] == "colwise"
    assert auto_plan(zoo.build("gpt2"))["h.*.attn.c_attn"] == "colwise"


# Files


def read_own_shards(comm, kind, directory):
    """From the meta device; then the whole again, on rank 0. The bytes asked for are counted."""
    from pycomm.tensor_parallel import checkpoint

    asked = []
    original = checkpoint._read
    checkpoint._read = lambda view, cut: asked.append(original(view, cut)) or asked[-1]
    try:
        with meta_parameters():
            model = zoo.build(kind)
        assert all(param.is_meta for param in model.parameters())
        parallelize(model, comm)
        load_safetensors(model, directory)
    finally:
        checkpoint._read = original
    whole, reference = full_state_dict(model), zoo.build(kind)
    # The bound of test_models.py: fewer than 2 ** 12 operations in fp64, on values up to 2 ** 8 times the result.
    want = zoo.loss_of(reference.eval(), 0).item()
    assert abs(zoo.loss_of(model.eval(), 0).item() - want) <= 2.0 ** (12 + 8 - 53) * want
    reference = reference.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, reference[name]), name
    if comm.rank == 0:
        assert whole.keys() == reference.keys()
    return sum(tensor.numel() for tensor in asked), sum(p.numel() for p in zoo.build(kind).parameters())


@needs_transformers
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "bloom", "bert"])
def test_ranks_read_their_shards_and_write_the_whole(pool, kind, tmp_path):
    zoo.build(kind).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    for read, total in pool.run(2, read_own_shards, kind, str(tmp_path)):
        assert read < 0.7 * total, "what is not cut are norms, biases and position embeddings"


def save_or_load(comm, kind, store, directory, save):
    dist.init_process_group(
        "gloo", store=file_store(store, comm.world_size), rank=comm.rank, world_size=comm.world_size
    )
    try:
        model = zoo.build(kind)
        if not save:
            for param in model.parameters():
                torch.nn.init.zeros_(param)
        parallelize(model, comm)
        state = sharded_state_dict(model, dist.device_mesh.init_device_mesh("cpu", (comm.world_size,)))
        if save:
            dcp.save(state, checkpoint_id=directory)
        else:
            dcp.load(state, checkpoint_id=directory)
        whole = full_state_dict(model)
    finally:
        dist.destroy_process_group()
    reference = zoo.build(kind).state_dict()
    return all(torch.equal(tensor, reference[name]) for name, tensor in whole.items())


@needs_transformers
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sharded_checkpoint_loads_on_another_number_of_ranks(pool, kind, tmp_path):
    pool.run(2, save_or_load, kind, str(tmp_path / "save"), str(tmp_path / "checkpoint"), True)
    for world_size in (1, 3):
        store = str(tmp_path / f"load{world_size}")
        assert (
            pool.run(world_size, save_or_load, kind, store, str(tmp_path / "checkpoint"), False) == [True] * world_size
        )


def missing(comm, directory):
    messages = []
    for folder in (directory, directory + "/nothing"):
        try:
            load_safetensors(parallelize(zoo.build("llama"), comm), folder)
        except (ValueError, FileNotFoundError) as error:
            messages.append(str(error).replace(directory, "DIR"))
    return messages


def all_on_meta(comm, directory):
    with torch.device("meta"):
        model = zoo.build("llama")
    try:
        load_safetensors(parallelize(model, comm), directory)
    except ValueError as error:
        return "inv_freq is on the meta device" in str(error) and "meta_parameters()" in str(error)
    return False


@needs_transformers
def test_a_buffer_that_would_have_no_values_is_told(pool, tmp_path):
    zoo.build("llama").save_pretrained(tmp_path)
    assert pool.run(2, all_on_meta, str(tmp_path)) == [True] * 2


@needs_transformers
def test_missing_files_and_tensors_are_told(pool, tmp_path):
    zoo.build("gpt2").save_pretrained(tmp_path)
    (messages,) = pool.run(1, missing, str(tmp_path))
    assert messages[0].startswith("DIR has no tensor for model.")
    assert messages[1] == "DIR/nothing has neither model.safetensors nor model.safetensors.index.json"
