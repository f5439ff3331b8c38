// The CUDA driver's streams and events.
//
// Rules kept: what makes streams, events and memory needs a current context; an event is passed when the stream comes
// to its record, and not before it has been recorded; streams run beside the host and beside each other.
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "standin.hpp"

using namespace pycomm::nccl::driver;

namespace {

constexpr auto kInvalidValue = static_cast<abi::Result>(1);
constexpr auto kInvalidContext = static_cast<abi::Result>(201);

thread_local int current_contexts = 0;

struct EventState {
  std::mutex mutex;
  std::condition_variable changed;
  std::uint64_t recorded = 0;
  std::uint64_t passed = 0;
};

}  // namespace

struct CUevent_st {
  std::shared_ptr<EventState> state = std::make_shared<EventState>();
};

CUstream_st::CUstream_st() : thread_([this] { loop(); }) { thread_.detach(); }

void CUstream_st::push(std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  queue_.push_back(std::move(work));
  changed_.notify_all();
}

void CUstream_st::loop() {
  while (true) {
    std::function<void()> work;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return !queue_.empty(); });
      work = std::move(queue_.front());
      queue_.pop_front();
    }
    work();
  }
}

extern "C" {

abi::Result cuInit(unsigned) { return abi::kSuccess; }
abi::Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return abi::kSuccess;
}
abi::Result cuDeviceGetCount(int* count) {
  *count = 1;
  return abi::kSuccess;
}
abi::Result cuDeviceGet(abi::Device* device, int index) {
  *device = index;
  return index == 0 ? abi::kSuccess : static_cast<abi::Result>(101);
}
abi::Result cuDeviceGetName(char* name, int size, abi::Device) {
  std::strncpy(name, "stand-in", static_cast<std::size_t>(size));
  return abi::kSuccess;
}
/// STANDIN_GPU, or a GPU of this process alone.
abi::Result cuDeviceGetUuid_v2(abi::Uuid* uuid, abi::Device) {
  const char* const name = std::getenv("STANDIN_GPU");
  std::memset(uuid, 0, sizeof(*uuid));
  std::strncpy(reinterpret_cast<char*>(uuid->bytes), (name == nullptr ? std::to_string(getpid()) : name).c_str(),
               sizeof(uuid->bytes));
  return abi::kSuccess;
}
abi::Result cuDevicePrimaryCtxRetain(abi::Context* context, abi::Device) {
  *context = reinterpret_cast<abi::Context>(1);
  return abi::kSuccess;
}
abi::Result cuDevicePrimaryCtxRelease_v2(abi::Device) { return abi::kSuccess; }
abi::Result cuCtxPushCurrent_v2(abi::Context) {
  ++current_contexts;
  return abi::kSuccess;
}
abi::Result cuCtxPopCurrent_v2(abi::Context*) {
  --current_contexts;
  return abi::kSuccess;
}
abi::Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return abi::kSuccess;
}
abi::Result cuStreamCreateWithPriority(abi::Stream* stream, unsigned flags, int priority) {
  if (current_contexts == 0) return kInvalidContext;
  if (flags != abi::kStreamNonBlocking || priority != -5) return kInvalidValue;
  *stream = new CUstream_st();  // never freed: its thread may hang in a kernel
  return abi::kSuccess;
}
abi::Result cuStreamDestroy_v2(abi::Stream) { return abi::kSuccess; }
abi::Result cuStreamGetCaptureInfo_v2(abi::Stream, abi::CaptureStatus* status, std::uint64_t*, void**, const void**,
                                      std::size_t*) {
  *status = abi::kNotCapturing;
  return abi::kSuccess;
}
abi::Result cuThreadExchangeStreamCaptureMode(abi::CaptureMode*) { return abi::kSuccess; }

abi::Result cuEventCreate(abi::Event* event, unsigned flags) {
  if (current_contexts == 0) return kInvalidContext;
  if (flags != abi::kEventDisableTiming) return kInvalidValue;
  *event = new CUevent_st();
  return abi::kSuccess;
}
abi::Result cuEventDestroy_v2(abi::Event event) {
  delete event;
  return abi::kSuccess;
}
abi::Result cuEventRecord(abi::Event event, abi::Stream stream) {
  if (stream == nullptr) return kInvalidValue;
  const auto state = event->state;
  const std::lock_guard lock(state->mutex);
  stream->push([state, number = ++state->recorded] {
    const std::lock_guard inside(state->mutex);
    state->passed = std::max(state->passed, number);
    state->changed.notify_all();
  });
  return abi::kSuccess;
}
abi::Result cuStreamWaitEvent(abi::Stream stream, abi::Event event, unsigned) {
  if (stream == nullptr) return kInvalidValue;
  const auto state = event->state;
  const std::lock_guard lock(state->mutex);
  stream->push([state, number = state->recorded] {
    std::unique_lock inside(state->mutex);
    state->changed.wait(inside, [&] { return state->passed >= number; });
  });
  return abi::kSuccess;
}
abi::Result cuEventQuery(abi::Event event) {
  const std::lock_guard lock(event->state->mutex);
  return event->state->passed == event->state->recorded ? abi::kSuccess : abi::kNotReady;
}
abi::Result cuMemsetD32Async(abi::DevicePointer memory, unsigned value, std::size_t count, abi::Stream stream) {
  if (current_contexts == 0) return kInvalidContext;
  stream->push([=] {
    for (std::size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(memory)[i] = value;
  });
  return abi::kSuccess;
}
abi::Result cuGetErrorString(abi::Result, const char** text) {
  *text = "an error of the stand-in";
  return abi::kSuccess;
}

// For tests.

void* standin_stream() { return new CUstream_st(); }

/// Copy on the stream after a while, as a kernel would write.
void standin_copy(void* stream, void* to, const void* from, std::size_t bytes, int delay_ms) {
  static_cast<CUstream_st*>(stream)->push([=] {
    std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
    std::memcpy(to, from, bytes);
  });
}

/// Block until the stream is empty; 0 if that takes too long.
int standin_synchronize(void* stream, int timeout_ms) {
  struct Meeting {
    std::mutex mutex;
    std::condition_variable changed;
    bool come = false;
  };
  const auto meeting = std::make_shared<Meeting>();
  static_cast<CUstream_st*>(stream)->push([meeting] {
    const std::lock_guard lock(meeting->mutex);
    meeting->come = true;
    meeting->changed.notify_all();
  });
  std::unique_lock lock(meeting->mutex);
  return meeting->changed.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] { return meeting->come; }) ? 1 : 0;
}
}
