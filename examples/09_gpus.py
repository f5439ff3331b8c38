"""GPUs: a sum that runs beside a matmul, and messages around a ring, on NCCL. One rank a GPU:

torchrun --nproc-per-node 2 examples/09_gpus.py
"""

import torch

import pycomm


def main() -> None:
    with pycomm.init("nccl") as comm:
        gradient = torch.full((1 << 20,), float(comm.rank + 1), device=comm.device)
        weight = torch.eye(512, device=comm.device)

        work = comm.all_reduce(gradient, async_op=True)  # on the communicator's stream, behind what made the tensor
        product = weight @ weight  # on the current stream, meanwhile
        work.wait()  # the current stream waits, this thread does not
        mean = gradient / comm.world_size

        left, right = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
        received = torch.empty_like(product)
        with comm.batch() as batch:  # one group: neither rank waits for its turn
            batch.send(product, right)
            batch.recv(received, left)

        comm.synchronize()  # all is done here; what went wrong would be raised
        assert mean[0].item() == (comm.world_size + 1) / 2
        assert torch.equal(received, torch.eye(512, device=comm.device))
        if comm.rank == 0:
            print(f"{comm.world_size} GPU(s): mean {mean[0].item()}, a product from rank {left}")


if __name__ == "__main__":
    main()
