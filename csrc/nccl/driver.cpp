#include "nccl/driver.hpp"

#include "pycomm/error.hpp"

namespace pycomm::nccl::driver {

Driver::Driver(const std::vector<std::string>& names) : library_("the CUDA driver", names) {
  abi::Init init = nullptr;
  abi::DriverGetVersion driver_get_version = nullptr;
  library_.get(init, "cuInit");
  library_.get(driver_get_version, "cuDriverGetVersion");
  library_.get(get_error_string_, "cuGetErrorString");
  library_.get(device_get_count_, "cuDeviceGetCount");
  library_.get(device_get_name_, "cuDeviceGetName");
  library_.get(device_get_uuid_, "cuDeviceGetUuid_v2");
  library_.get(device_get, "cuDeviceGet");
  library_.get(primary_ctx_retain, "cuDevicePrimaryCtxRetain");
  library_.get(primary_ctx_release, "cuDevicePrimaryCtxRelease_v2");
  library_.get(ctx_push_current, "cuCtxPushCurrent_v2");
  library_.get(ctx_pop_current, "cuCtxPopCurrent_v2");
  library_.get(ctx_get_stream_priority_range, "cuCtxGetStreamPriorityRange");
  library_.get(stream_create_with_priority, "cuStreamCreateWithPriority");
  library_.get(stream_destroy, "cuStreamDestroy_v2");
  library_.get(stream_wait_event, "cuStreamWaitEvent");
  library_.get(stream_get_capture_info_, "cuStreamGetCaptureInfo_v2");
  library_.get(exchange_capture_mode_, "cuThreadExchangeStreamCaptureMode");
  library_.get(event_create, "cuEventCreate");
  library_.get(event_record, "cuEventRecord");
  library_.get(event_query, "cuEventQuery");
  library_.get(event_destroy, "cuEventDestroy_v2");
  library_.get(memset_d32_async, "cuMemsetD32Async");

  int count = 0;
  const abi::Result result = init(0);
  if (result == abi::kSuccess) check(device_get_count_(&count), "cuDeviceGetCount");
  if (result != abi::kSuccess && result != abi::kNoDevice) {
    throw Error(ErrorKind::kUnavailable, "cuInit of " + file() + " returns " +
                                             std::to_string(static_cast<int>(result)) + ": look at nvidia-smi");
  }
  if (count == 0) throw Error(ErrorKind::kUnavailable, "the CUDA driver at " + file() + " sees no device");
  check(driver_get_version(&version_), "cuDriverGetVersion");
}

std::vector<std::string> Driver::device_names() const {
  int count = 0;
  check(device_get_count_(&count), "cuDeviceGetCount");
  std::vector<std::string> names;
  for (int index = 0; index < count; ++index) {
    abi::Device device = 0;
    char name[128] = {};
    check(device_get(&device, index), "cuDeviceGet");
    check(device_get_name_(name, sizeof(name), device), "cuDeviceGetName");
    names.emplace_back(name);
  }
  return names;
}

std::string Driver::device_uuid(int index) const {
  constexpr char kDigits[] = "0123456789abcdef";
  abi::Device device = 0;
  abi::Uuid uuid{};
  check(device_get(&device, index), "cuDeviceGet");
  check(device_get_uuid_(&uuid, device), "cuDeviceGetUuid");
  std::string text;
  for (const unsigned char byte : uuid.bytes) text += {kDigits[byte >> 4], kDigits[byte & 15]};
  return text;
}

void Driver::check(abi::Result result, const char* call) const {
  if (result == abi::kSuccess) return;
  const char* text = nullptr;
  get_error_string_(result, &text);
  throw Error(ErrorKind::kGeneral, std::string(call) + " returns " + std::to_string(static_cast<int>(result)) + ": " +
                                       (text == nullptr ? "unknown error" : text));
}

std::uint64_t Driver::capture_of(abi::Stream stream) const {
  abi::CaptureStatus status = abi::kNotCapturing;
  std::uint64_t id = 0;
  check(stream_get_capture_info_(stream, &status, &id, nullptr, nullptr, nullptr), "cuStreamGetCaptureInfo");
  return status == abi::kNotCapturing ? 0 : id;
}

void Driver::allow_queries_during_capture() const {
  abi::CaptureMode mode = abi::kCaptureRelaxed;
  check(exchange_capture_mode_(&mode), "cuThreadExchangeStreamCaptureMode");
}

Context::Context(const Driver& driver, int device) : driver_(driver) {
  driver.check(driver.device_get(&device_, device), "cuDeviceGet");
  driver.check(driver.primary_ctx_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Context::~Context() { driver_.primary_ctx_release(device_); }

Context::Current::Current(const Context& context) : context_(context) {
  context.driver_.check(context.driver_.ctx_push_current(context.context_), "cuCtxPushCurrent");
}

Context::Current::~Current() {
  abi::Context popped = nullptr;
  context_.driver_.ctx_pop_current(&popped);
}

Stream::Stream(const Context& context) : driver_(context.driver()) {
  int least = 0;
  int greatest = 0;
  driver_.check(driver_.ctx_get_stream_priority_range(&least, &greatest), "cuCtxGetStreamPriorityRange");
  driver_.check(driver_.stream_create_with_priority(&stream_, abi::kStreamNonBlocking, greatest),
                "cuStreamCreateWithPriority");
}

Stream::~Stream() { driver_.stream_destroy(stream_); }

Event::Event(const Driver& driver) : driver_(driver) {
  driver_.check(driver_.event_create(&event_, abi::kEventDisableTiming), "cuEventCreate");
}

Event::~Event() { driver_.event_destroy(event_); }

void Event::record(abi::Stream stream) { driver_.check(driver_.event_record(event_, stream), "cuEventRecord"); }

void Event::make_wait(abi::Stream stream) const {
  driver_.check(driver_.stream_wait_event(stream, event_, 0), "cuStreamWaitEvent");
}

bool Event::passed() const {
  const abi::Result result = driver_.event_query(event_);
  if (result == abi::kNotReady) return false;
  driver_.check(result, "cuEventQuery");
  return true;
}

}  // namespace pycomm::nccl::driver
