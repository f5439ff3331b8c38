"""Pipeline parallel: a GPT's layers divided over the ranks, micro-batches flowing through, checked against one process.

Run:
    python examples/05_pipeline.py
    torchrun --nproc-per-node 2 examples/05_pipeline.py
"""

import torch

import pycomm
from pycomm.models import GPT, GPTConfig, gpt_stages, next_token_loss
from pycomm.pipeline import Pipeline, build, draw, simulate

NUM_STEPS = 20
CONFIG = GPTConfig(vocab_size=64, max_seq=32, num_layers=4, num_heads=2, hidden=32)


def main() -> None:
    with pycomm.init("host") as comm:
        schedule = build("1f1b", num_ranks=comm.world_size, num_microbatches=4)
        if comm.rank == 0:
            print(draw.text(simulate(schedule)))

        stages = gpt_stages(GPT(CONFIG, seed=0), comm, schedule.rank_of)  # this rank's; the tied embedding is shared
        pipe = Pipeline(stages, schedule, next_token_loss)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.5)
        tokens = torch.randint(CONFIG.vocab_size, (8, 33), generator=torch.Generator().manual_seed(1))
        inputs = tokens[:, :-1] if comm.rank == 0 else None
        targets = tokens[:, 1:] if comm.rank == comm.world_size - 1 else None
        for step in range(1, NUM_STEPS + 1):
            optimizer.zero_grad()
            loss = pipe.step(inputs, targets)
            optimizer.step()
            if loss is not None and step % 5 == 0:
                print(f"step {step:3d}  loss {loss.item():.4f}")
        final = pipe.evaluate(inputs, targets)
        if final is not None:
            alone = loss_of_one_process(tokens)
            # The same numbers, summed in another order: fp32 roundings of 6e-8 that 20 steps make larger.
            if abs(final.item() - alone) > 1e-4:
                raise SystemExit(f"the pipeline ends at {final.item()}, one process at {alone}")
            print(f"one process agrees: loss {alone:.4f} after {NUM_STEPS} steps on {comm.world_size} rank(s)")


def loss_of_one_process(tokens: torch.Tensor) -> float:
    model = GPT(CONFIG, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        return next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).item()


if __name__ == "__main__":
    main()
