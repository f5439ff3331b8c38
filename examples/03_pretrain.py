"""Pretraining by hand: the loop behind `pycomm pretrain`, in one screen.

    torchrun --nproc-per-node 2 examples/03_pretrain.py
    python examples/03_pretrain.py                        (one process, the same code)

Each rank draws its own random pieces of the standard library's source text, byte by byte; DataParallel averages the
gradients while backward computes them.
"""

import sysconfig
from pathlib import Path

import torch

import pycomm
from pycomm.models import GPT, GPTConfig, next_token_loss

BATCH, SEQ, STEPS = 8, 128, 100


def main() -> None:
    comm = pycomm.init("host")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)

    model = GPT(GPTConfig(vocab_size=256, max_seq=SEQ, num_layers=2, hidden=128), seed=0)
    ddp = pycomm.DataParallel(model, comm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(comm.rank)  # other data on each rank

    for step in range(1, STEPS + 1):
        starts = torch.randint(len(text) - SEQ, (BATCH,), generator=generator).tolist()
        pieces = torch.stack([text[start : start + SEQ + 1] for start in starts]).long()
        optimizer.zero_grad(set_to_none=False)  # the gradients stay where they are: in the buckets
        loss = next_token_loss(ddp(pieces[:, :-1]), pieces[:, 1:])
        loss.backward()  # when it returns, every rank has the same averaged gradients
        optimizer.step()

        mean = loss.detach().clone()
        comm.all_reduce(mean, "avg")
        if comm.rank == 0 and (step == 1 or step % 20 == 0):
            print(f"step {step:3}  loss {mean.item():.3f}  waited {ddp.exposed_comm_s * 1e3:.1f} ms for gradients")

    if comm.rank == 0:
        prompt = torch.tensor(list(b"def "))
        continued = model.generate(prompt, 100, temperature=0.7, generator=torch.Generator().manual_seed(0))
        print(bytes(continued.tolist()).decode(errors="replace"))
    comm.close()


if __name__ == "__main__":
    main()
