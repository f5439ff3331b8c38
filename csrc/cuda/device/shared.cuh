// A block's shared memory, of the size that its launch asked for. Behind a function, so that tests can supply it.
#pragma once

namespace pycomm::cuda {

template <class T>
__device__ inline T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return reinterpret_cast<T*>(cuda_on_cpu::shared_memory());
#endif
}

}  // namespace pycomm::cuda
