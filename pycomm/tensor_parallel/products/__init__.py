"""Matrix products with their communication in one operator: the building blocks of tensor-parallel layers.

==========================  ==========================================  =====================================
operator                    forward                                     backward
==========================  ==========================================  =====================================
``all_gather_matmul``       cat(x over ranks) @ weight.T                matmul + reduce_scatter for x
``matmul_reduce_scatter``   sum over ranks of x @ weight.T, own rows    all_gather + matmul for x
``matmul_all_reduce``       sum over ranks of x @ weight.T              no communication
``copy_matmul``             x @ weight.T                                matmul + all_reduce for x
==========================  ==========================================  =====================================

Each takes a bias, which is added once. Under autocast they multiply, and communicate, in its dtype. Autograd saves this
rank's x and weight, never gathered ones. Double backward is not there: it raises.

Each communicator owns the implementation of :class:`Products` that suits it: ``plain.py`` goes by collectives on any
back end, ``cuda.py`` has overlapped products on GPUs that map each other's memory. ``operators.py`` chooses.

Refs: "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism" (2019); "Reducing
Activation Recomputation in Large Transformer Models" (2022) for the sequence-parallel pair; "Breaking the Computation
and Communication Abstraction Barrier in Distributed Machine Learning Workloads" (CoCoNet, 2022) for the overlap.
"""

from pycomm.tensor_parallel.products.operators import (
    all_gather_matmul,
    copy_matmul,
    matmul_all_reduce,
    matmul_reduce_scatter,
    products_of,
)
from pycomm.tensor_parallel.products.protocol import Products

__all__ = [
    "Products",
    "all_gather_matmul",
    "copy_matmul",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "products_of",
]
