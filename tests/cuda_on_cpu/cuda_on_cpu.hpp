// What .cu files need to be compiled and run as C++: included before anything else, as nvcc includes its own headers.
// Supplies the part of CUDA that pycomm's kernels use, no more: blocks of threads in one dimension, warps with
// __shfl_xor_sync, __syncthreads, dynamic shared memory, launches on streams; and the portable twins of signal.cuh.
//
// Two implementations of the functions declared here:
//
//   fibers.cpp   every CUDA thread of all launched kernels is a fiber of one OS thread. A seed draws who runs next at
//                each barrier, shuffle and flag, so a failure repeats exactly. Time counts looks at the clock.
//   threads.cpp  every CUDA thread is an OS thread. For ThreadSanitizer and AddressSanitizer, with small blocks.
//
// A launch only queues the kernel on its stream; run() runs all queues, each in order and all at the same time: that is
// how the kernels of several ranks meet. include/cuda_runtime_api.h adds what host code of pycomm calls of the runtime:
// memory, copies, events; each is a step of its stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  dim3(unsigned count = 1) : x(count) {}  // NOLINT: converts, as CUDA's does
  unsigned x;
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorNotReady = 600,
};
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct cudaFuncAttributes {};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_cpu {

/// Who the calling CUDA thread is.
struct Position {
  unsigned thread = 0, block = 0, num_threads = 0, num_blocks = 0;
};
const Position& position();

/// threadIdx and its like: their x is looked up when it is read.
template <unsigned Position::* kWhich>
struct Axes {
  struct {
    operator unsigned() const { return position().*kWhich; }  // NOLINT: converts, for it stands for a number
  } x;
};

cudaStream_t make_stream();
void free_stream(cudaStream_t stream);
void enqueue(const cudaLaunchConfig_t& config, std::function<void()> kernel);
/// Runs everything that is queued on any stream. The seed chooses among schedules, where there is a choice.
void run(std::uint32_t seed);

/// A step that a stream takes itself, no kernel: tried until it says that it is done. Fibers only.
void enqueue_step(cudaStream_t stream, std::function<bool()> step);
/// What lies on all streams: after run(), steps that wait for what never comes, and all behind them.
std::size_t num_queued();

/// Blocks that the device runs at a time, one a multiprocessor.
inline int num_multiprocessors = 1 << 20;

/// Weaken one ordering of signal.cuh by its number; -1: none.
void weaken(int ordering);

void store_release(std::uint32_t* flag, std::uint32_t value, int ordering);
std::uint32_t load_acquire(std::uint32_t* flag, int ordering);
void store_relaxed(std::uint32_t* flag, std::uint32_t value);
std::uint32_t load_relaxed(std::uint32_t* flag);
std::uint32_t exchange_relaxed(std::uint32_t* flag, std::uint32_t value);
bool sync_block(bool ok, int ordering = -1);
std::uint64_t now_ns();
void* shared_memory();

/// What the lane `distance` away by exclusive or passes; all lanes of the warp call it.
std::uint64_t shuffle_xor(std::uint64_t bits, int distance);

}  // namespace cuda_on_cpu

inline constexpr cuda_on_cpu::Axes<&cuda_on_cpu::Position::thread> threadIdx;
inline constexpr cuda_on_cpu::Axes<&cuda_on_cpu::Position::block> blockIdx;
inline constexpr cuda_on_cpu::Axes<&cuda_on_cpu::Position::num_threads> blockDim;
inline constexpr cuda_on_cpu::Axes<&cuda_on_cpu::Position::num_blocks> gridDim;

inline void __syncthreads() { cuda_on_cpu::sync_block(true); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_on_cpu::shuffle_xor(bits, distance);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_on_cpu::num_multiprocessors;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

template <class Params, class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Argument& argument) {
  cuda_on_cpu::enqueue(*config, [kernel, params = Params(argument)] { kernel(params); });
  return cudaSuccess;
}
