"""Three axes: a GPT divided over pipeline stages, their layers over tensor-parallel ranks, batches over replicas.

Optimizer states are sharded over the replicas (ZeRO). One process, given the same batches, comes to the same loss.

Run:
    python examples/10_mesh.py
    torchrun --nproc-per-node 4 examples/10_mesh.py --dp 2 --pp 2 --zero 2
    torchrun --nproc-per-node 4 examples/10_mesh.py --pp 2 --tp 2
    torchrun --nproc-per-node 8 examples/10_mesh.py --dp 2 --pp 2 --tp 2
"""

import argparse

import torch

import pycomm
from pycomm.models import GPT, GPTConfig, gpt_stages
from pycomm.pipeline import Pipeline, build
from pycomm.tensor_parallel import auto_plan, parallelize, vocab_parallel_cross_entropy

NUM_STEPS, ROWS, MICROBATCHES = 20, 8, 4
CONFIG = GPTConfig(vocab_size=64, max_seq=32, num_layers=4, num_heads=2, hidden=32)


def main() -> None:
    parser = argparse.ArgumentParser()
    for axis in ("dp", "pp", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--zero", type=int, default=1, choices=(0, 1, 2), help="stage of ShardedAdamW")
    parser.add_argument("--schedule", default="1f1b")
    args = parser.parse_args()
    with pycomm.init("host") as comm, pycomm.Mesh(comm, dp=args.dp, pp=args.pp, tp=args.tp) as mesh:
        schedule = build(args.schedule, num_ranks=args.pp, num_microbatches=MICROBATCHES)
        model = GPT(CONFIG, seed=0)
        # Cut the layers first, with the logits left where they are computed; then take this rank's stages of them, and
        # make each a replica.
        parallelize(model, mesh.tp, auto_plan(model) | {"unembedding": "colwise"}, sequence_parallel=True)
        stages = gpt_stages(model, mesh.pp, schedule.rank_of, wrap=lambda module: pycomm.DataParallel(module, mesh.dp))
        pipe = Pipeline(stages, schedule, lambda logits, ids: vocab_parallel_cross_entropy(logits, ids, mesh.tp))
        replicas = [stage.module for stage in stages]
        optimizers = [pycomm.ShardedAdamW(replica, lr=3e-3, stage=args.zero) for replica in replicas]

        first, last = (mesh.pp_rank == schedule.rank_of[end] for end in (0, -1))
        tokens = batches(args.dp)[mesh.dp_rank]
        for step in range(1, NUM_STEPS + 1):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = pipe.step(tokens[:, :-1] if first else None, tokens[:, 1:] if last else None)
            norm = pycomm.clip_grad_norm_(replicas, 1.0, mesh)
            for optimizer in optimizers:
                optimizer.step()
            if loss is not None and mesh.tp_rank == 0 and step % 5 == 0:
                print(f"step {step:3d}  replica {mesh.dp_rank}  loss {loss.item():.4f}  norm {norm.item():.3f}")
        final = pipe.evaluate(tokens[:, :-1] if first else None, tokens[:, 1:] if last else None)
        if final is not None:
            alone = loss_of_one_process(args.dp, mesh.dp_rank)
            # The same numbers, summed in another order: fp32 roundings of 6e-8 that 20 steps of Adam make larger.
            if abs(final.item() - alone) > 1e-3:
                raise SystemExit(f"{mesh} ends at {final.item()}, one process at {alone}")
            if mesh.tp_rank == 0:
                print(f"one process agrees on replica {mesh.dp_rank}'s batch: loss {alone:.4f} after {NUM_STEPS} steps")


def batches(num: int) -> tuple[torch.Tensor, ...]:
    tokens = torch.randint(CONFIG.vocab_size, (ROWS * num, 33), generator=torch.Generator().manual_seed(1))
    return tokens.split(ROWS)


def loss_of_one_process(num_replicas: int, replica: int) -> float:
    model = GPT(CONFIG, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(torch.cat(batches(num_replicas))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return loss_of(batches(num_replicas)[replica]).item()


if __name__ == "__main__":
    main()
