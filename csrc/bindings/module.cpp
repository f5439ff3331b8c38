#include "bindings/bindings.hpp"

#ifndef PYCOMM_CUDA_BUILD
#define PYCOMM_CUDA_BUILD ""
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "pycomm's compiled core; use it through the pycomm package.";
  module.def("version", [] { return PYCOMM_VERSION; });
  module.def(
      "cuda_build", [] { return PYCOMM_CUDA_BUILD; },
      "The CUDA version and architectures that the kernels were built with; empty: without kernels.");
  pycomm::bindings::bind_errors(module);
  pycomm::bindings::bind_reduce(module);
  pycomm::bindings::bind_arguments(module);
  pycomm::bindings::bind_work(module);
  pycomm::bindings::bind_communicator(module);
  pycomm::bindings::bind_collectives(module);
  pycomm::bindings::bind_gradient_step(module);
  pycomm::bindings::bind_nccl(module);
  pycomm::bindings::bind_rank_group(module);
  pycomm::bindings::bind_overlapped_matmul(module);
}
