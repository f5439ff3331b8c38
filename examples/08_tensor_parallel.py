"""Tensor parallel: one model cut over the ranks, which all see the same tokens; nobody ever has the whole logits.

Run:
    python examples/08_tensor_parallel.py
    torchrun --nproc-per-node 2 examples/08_tensor_parallel.py
"""

import torch

import pycomm
from pycomm.models import GPT, GPTConfig
from pycomm.tensor_parallel import auto_plan, full_state_dict, parallelize, vocab_parallel_cross_entropy

NUM_STEPS = 40


def main() -> None:
    with pycomm.init("host") as comm:
        model = GPT(GPTConfig(vocab_size=60, max_seq=32, num_heads=5, hidden=40))  # the same weights on every rank
        # The plan that pycomm has for this model, but with logits left where they are computed.
        plan = auto_plan(model) | {"unembedding": "colwise"}
        parallelize(model, comm, plan, sequence_parallel=True)
        here = sum(param.numel() for param in model.parameters())
        heads = model.blocks[0].attention.num_heads
        print(f"rank {comm.rank}: {heads} of 5 heads, {here} weights")

        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(0)  # all ranks draw the same rows
        for step in range(1, NUM_STEPS + 1):
            start = torch.randint(60, (16, 1), generator=generator)
            tokens = (start + torch.arange(33)) % 60
            logits = model(tokens[:, :-1])  # [rows, positions, this rank's part of the vocabulary]
            loss = vocab_parallel_cross_entropy(logits, tokens[:, 1:], comm)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0 and comm.rank == 0:
                print(f"step {step:3d}  loss {loss.item():.4f}")

        whole = full_state_dict(model)  # on rank 0: the weights of the model in one piece
        if comm.rank == 0:
            print(
                f"whole model: {sum(t.numel() for t in GPT(model.config).parameters())} weights, {len(whole)} tensors"
            )


if __name__ == "__main__":
    main()
