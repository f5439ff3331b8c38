// What is used here of the CUDA driver's C interface (libcuda.so.1), declared anew so that no CUDA header is needed to
// build. Facts from cuda.h of CUDA 12.4 and 13.0, whose driver entry points of these names are the same in both. The
// driver and not the runtime: every machine with a GPU has exactly one, and its streams and events are the runtime's.
#pragma once

#include <cstddef>
#include <cstdint>

// The driver's own names of what its handles point to.
struct CUstream_st;
struct CUevent_st;
struct CUctx_st;

namespace pycomm::nccl::driver::abi {

using Stream = CUstream_st*;  // cudaStream_t
using Event = CUevent_st*;
using Context = CUctx_st*;
using Device = int;
using DevicePointer = unsigned long long;

struct Uuid {
  unsigned char bytes[16];
};

enum Result : int {
  kSuccess = 0,
  kNoDevice = 100,
  kNotReady = 600,
};

inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;

enum CaptureStatus : int { kNotCapturing = 0 };
enum CaptureMode : int { kCaptureGlobal = 0, kCaptureThreadLocal = 1, kCaptureRelaxed = 2 };

extern "C" {
using Init = Result (*)(unsigned);
using DriverGetVersion = Result (*)(int*);
using DeviceGetCount = Result (*)(int*);
using DeviceGet = Result (*)(Device*, int);
using DeviceGetName = Result (*)(char*, int, Device);
using DeviceGetUuid = Result (*)(Uuid*, Device);
using DevicePrimaryCtxRetain = Result (*)(Context*, Device);
using DevicePrimaryCtxRelease = Result (*)(Device);
using CtxPushCurrent = Result (*)(Context);
using CtxPopCurrent = Result (*)(Context*);
using CtxGetStreamPriorityRange = Result (*)(int*, int*);
using StreamCreateWithPriority = Result (*)(Stream*, unsigned, int);
using StreamDestroy = Result (*)(Stream);
using StreamWaitEvent = Result (*)(Stream, Event, unsigned);
// Of version 2: the graph, its dependencies and their number may be nullptr.
using StreamGetCaptureInfo = Result (*)(Stream, CaptureStatus*, std::uint64_t*, void**, const void**, std::size_t*);
using ThreadExchangeStreamCaptureMode = Result (*)(CaptureMode*);
using EventCreate = Result (*)(Event*, unsigned);
using EventRecord = Result (*)(Event, Stream);
using EventQuery = Result (*)(Event);
using EventDestroy = Result (*)(Event);
using MemsetD32Async = Result (*)(DevicePointer, unsigned, std::size_t, Stream);
using GetErrorString = Result (*)(Result, const char**);
}

}  // namespace pycomm::nccl::driver::abi
