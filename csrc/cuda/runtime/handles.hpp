// Owners of streams, events and memory of the CUDA runtime. Move-only; destructors do not throw, so what a destroyed
// handle would report is left to the next call that is checked.
#pragma once

#include <cstddef>
#include <utility>

#include "cuda/runtime/check.hpp"

namespace pycomm::cuda {

/// Makes a device current, and the one before again at the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    PYCOMM_CUDA_CHECK(cudaGetDevice(&before_));
    if (device != before_) PYCOMM_CUDA_CHECK(cudaSetDevice(device));
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() { static_cast<void>(cudaSetDevice(before_)); }

 private:
  int before_ = 0;
};

/// Of the current device.
class OwnedStream {
 public:
  enum class Priority { kUsual, kHighest };
  explicit OwnedStream(Priority priority = Priority::kUsual) {
    int least = 0;
    int greatest = 0;
    PYCOMM_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    PYCOMM_CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking,
                                                   priority == Priority::kHighest ? greatest : least));
  }
  OwnedStream(OwnedStream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  OwnedStream& operator=(OwnedStream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  OwnedStream(const OwnedStream&) = delete;  // one owner destroys it
  OwnedStream& operator=(const OwnedStream&) = delete;
  ~OwnedStream() {
    if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Without timing.
class Event {
 public:
  Event() { PYCOMM_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  Event(const Event&) = delete;  // one owner destroys it
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_ != nullptr) static_cast<void>(cudaEventDestroy(event_));
  }

  void record(cudaStream_t stream) { PYCOMM_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  /// What `stream` does from now on comes after the last record().
  void make_wait(cudaStream_t stream) const { PYCOMM_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }
  bool passed() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) return false;
    PYCOMM_CUDA_CHECK(status);
    return true;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// Memory of the current device, or of the host where the device reads and writes it, too.
class OwnedMemory {
 public:
  OwnedMemory() = default;
  static OwnedMemory on_device(std::size_t bytes) {
    OwnedMemory memory;
    if (bytes > 0) PYCOMM_CUDA_CHECK(cudaMalloc(&memory.data_, bytes));
    return memory;
  }
  static OwnedMemory on_host(std::size_t bytes) {
    OwnedMemory memory;
    memory.on_host_ = true;
    PYCOMM_CUDA_CHECK(cudaHostAlloc(&memory.data_, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
    return memory;
  }
  OwnedMemory(OwnedMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), on_host_(other.on_host_) {}
  OwnedMemory& operator=(OwnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(on_host_, other.on_host_);
    return *this;
  }
  OwnedMemory(const OwnedMemory&) = delete;  // one owner frees it
  OwnedMemory& operator=(const OwnedMemory&) = delete;
  ~OwnedMemory() {
    if (data_ != nullptr) static_cast<void>(on_host_ ? cudaFreeHost(data_) : cudaFree(data_));
  }

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  /// Where the device finds memory of the host.
  void* on_this_device() const {
    void* address = nullptr;
    PYCOMM_CUDA_CHECK(cudaHostGetDevicePointer(&address, data_, 0));
    return address;
  }

 private:
  void* data_ = nullptr;
  bool on_host_ = false;
};

}  // namespace pycomm::cuda
