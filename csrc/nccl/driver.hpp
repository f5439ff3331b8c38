// The CUDA driver, loaded at run time, and owners of its streams and events.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "nccl/driver_abi.hpp"
#include "pycomm/shared_library.hpp"

namespace pycomm::nccl::driver {

class Driver {
 public:
  /// Names as SharedLibrary takes them. Throws kUnavailable where there is no driver or no GPU.
  explicit Driver(const std::vector<std::string>& names);

  std::string file() const { return library_.file(); }
  int version() const { return version_; }  // 13000: the newest CUDA that it serves
  std::vector<std::string> device_names() const;
  /// In hexadecimal: of the GPU, or of the part of one (MIG) that the process is given, whatever number it has here.
  std::string device_uuid(int index) const;
  /// Throws kGeneral unless the call succeeded.
  void check(abi::Result result, const char* call) const;
  /// Which capture into a graph the stream is in; 0: none.
  std::uint64_t capture_of(abi::Stream stream) const;
  /// From now on this thread may look at events while another one captures a graph.
  void allow_queries_during_capture() const;

  abi::DeviceGet device_get;
  abi::DevicePrimaryCtxRetain primary_ctx_retain;
  abi::DevicePrimaryCtxRelease primary_ctx_release;
  abi::CtxPushCurrent ctx_push_current;
  abi::CtxPopCurrent ctx_pop_current;
  abi::CtxGetStreamPriorityRange ctx_get_stream_priority_range;
  abi::StreamCreateWithPriority stream_create_with_priority;
  abi::StreamDestroy stream_destroy;
  abi::StreamWaitEvent stream_wait_event;
  abi::EventCreate event_create;
  abi::EventRecord event_record;
  abi::EventQuery event_query;
  abi::EventDestroy event_destroy;
  abi::MemsetD32Async memset_d32_async;

 private:
  SharedLibrary library_;
  int version_ = 0;
  abi::DeviceGetCount device_get_count_;
  abi::DeviceGetName device_get_name_;
  abi::DeviceGetUuid device_get_uuid_;
  abi::StreamGetCaptureInfo stream_get_capture_info_;
  abi::ThreadExchangeStreamCaptureMode exchange_capture_mode_;
  abi::GetErrorString get_error_string_;
};

/// The primary context of a device, which torch and the CUDA runtime use, too.
class Context {
 public:
  Context(const Driver& driver, int device);
  Context(const Context&) = delete;  // released once
  Context& operator=(const Context&) = delete;
  ~Context();

  const Driver& driver() const { return driver_; }

  /// Makes it current on this thread while it lives.
  class Current {
   public:
    explicit Current(const Context& context);
    Current(const Current&) = delete;  // marks one scope
    Current& operator=(const Current&) = delete;
    ~Current();

   private:
    const Context& context_;
  };

 private:
  const Driver& driver_;
  abi::Device device_ = 0;
  abi::Context context_ = nullptr;
};

/// A stream of the highest priority that no other stream blocks. Create and destroy it with the context current.
class Stream {
 public:
  explicit Stream(const Context& context);
  Stream(const Stream&) = delete;  // destroyed once
  Stream& operator=(const Stream&) = delete;
  ~Stream();

  abi::Stream get() const { return stream_; }

 private:
  const Driver& driver_;
  abi::Stream stream_ = nullptr;
};

/// Without timing. Create it with the context current.
class Event {
 public:
  explicit Event(const Driver& driver);
  Event(const Event&) = delete;  // destroyed once
  Event& operator=(const Event&) = delete;
  ~Event();

  void record(abi::Stream stream);
  /// What `stream` does from now on comes after what was recorded.
  void make_wait(abi::Stream stream) const;
  /// False while what came before the record is under way. Throws kGeneral: the device has failed.
  bool passed() const;

 private:
  const Driver& driver_;
  abi::Event event_ = nullptr;
};

}  // namespace pycomm::nccl::driver
