// What pycomm's host code calls of the CUDA runtime, over cuda_on_cpu.hpp: host memory stands for the device's, and
// copies and events are steps of streams, which run() takes in an order drawn from its seed. Stands in place of CUDA's
// header of that name.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../cuda_on_cpu.hpp"

struct CUevent_st {
  // Shared with the steps that look at them, which may outlive the event.
  std::shared_ptr<unsigned> passed = std::make_shared<unsigned>(0);
  unsigned recorded = 0;
};
using cudaEvent_t = CUevent_st*;

enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;
inline constexpr unsigned cudaHostAllocPortable = 1;
inline constexpr unsigned cudaHostAllocMapped = 2;

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}

// Guard bytes on both sides of an allocation: whoever wrote there is found when it is freed.
inline constexpr std::size_t kGuardBytes = 256;
inline cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  auto* const start = static_cast<std::byte*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 2 * kGuardBytes));
  std::memset(start, 0xA5, bytes + 2 * kGuardBytes);
  std::memcpy(start, &bytes, sizeof bytes);
  std::memset(start + kGuardBytes, 0x5A, bytes);  // a new allocation holds anything
  *memory = start + kGuardBytes;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  std::byte* const start = static_cast<std::byte*>(memory) - kGuardBytes;
  std::size_t bytes = 0;
  std::memcpy(&bytes, start, sizeof bytes);
  const auto is_intact = [](const std::byte* from, const std::byte* to) {
    return std::all_of(from, to, [](std::byte value) { return value == std::byte{0xA5}; });
  };
  const std::byte* const end = start + kGuardBytes + bytes;
  if (!is_intact(start + sizeof bytes, start + kGuardBytes) || !is_intact(end, end + kGuardBytes)) {
    std::fprintf(stderr, "cuda_on_cpu: something was written outside an allocation of %zu bytes\n", bytes);
    std::abort();
  }
  std::free(start);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) { return cudaMalloc(memory, bytes); }
inline cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
inline cudaError_t cudaHostGetDevicePointer(void** address, void* memory, unsigned) {
  *address = memory;
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = cuda_on_cpu::make_stream();
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  cuda_on_cpu::free_stream(stream);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  cuda_on_cpu::enqueue_step(stream, [=] {
    std::memcpy(to, from, bytes);
    return true;
  });
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  cuda_on_cpu::enqueue_step(stream, [=] {
    std::memset(memory, value, bytes);
    return true;
  });
  return cudaSuccess;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  cuda_on_cpu::enqueue_step(stream, [passed = event->passed, number = ++event->recorded] {
    *passed = number;
    return true;
  });
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  cuda_on_cpu::enqueue_step(stream, [passed = event->passed, number = event->recorded] { return *passed >= number; });
  return cudaSuccess;
}

// The host waits: everything that can run does.
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  cuda_on_cpu::run(0);
  return *event->passed >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaStreamQuery(cudaStream_t) {
  cuda_on_cpu::run(0);
  return cuda_on_cpu::num_queued() == 0 ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  cuda_on_cpu::run(0);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
