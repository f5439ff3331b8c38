// What is used here of NCCL's C interface, declared anew so that no NCCL header is needed to build. Facts from nccl.h
// of 2.18.1 to 2.32.3: enumerators never change, structs only grow at their end, and the library reads a struct by the
// `size` and `version` that it carries (parseCommConfig in NCCL's src/init.cc). tests/nccl compares this file with the
// header of NCCL's wheel where that is installed.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "nccl/driver_abi.hpp"

namespace pycomm::nccl::abi {

struct Comm;  // opaque
struct WindowHandle;
using Window = WindowHandle*;  // ncclWindow_t

struct UniqueId {
  char internal[128];
};

enum Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

enum DataType : int {
  kInt8 = 0,
  kUint8 = 1,
  kInt32 = 2,
  kInt64 = 4,
  kFloat16 = 6,
  kFloat32 = 7,
  kFloat64 = 8,
  kBfloat16 = 9,
};

enum RedOp : int { kSum = 0, kProd = 1, kMax = 2, kMin = 3, kAvg = 4 };

inline constexpr int kUndefined = INT_MIN;
inline constexpr int kNoColor = -1;
inline constexpr int kWindowCollectiveSymmetric = 1;  // NCCL_WIN_COLL_SYMMETRIC
inline constexpr unsigned kMagic = 0xcafebeef;

constexpr int version_code(int major, int minor, int patch) { return major * 10000 + minor * 100 + patch; }

/// ncclConfig_t as of 2.17: newer members, which `version` says are not here, get their defaults.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned magic = kMagic;
  unsigned version = version_code(2, 18, 0);
  int blocking = 0;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
};

/// ncclCollConfig_t of 2.31, the smallest that any version takes.
struct CollConfig {
  std::size_t size = sizeof(CollConfig);
  unsigned magic = kMagic;
  unsigned version = version_code(2, 31, 0);
  void* extensions = nullptr;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  int nvls_ctas = kUndefined;
  int cga_cluster_size = kUndefined;
  const char* algorithms = nullptr;
  int force_algorithms = 1;
  int cta_policy = kUndefined;
  std::uint64_t profiler_tag = 0;
};

using Stream = driver::abi::Stream;

extern "C" {
using GetVersion = Result (*)(int*);
using GetUniqueId = Result (*)(UniqueId*);
using GetErrorString = const char* (*)(Result);
using GetLastError = const char* (*)(Comm*);
using CommInitRankConfig = Result (*)(Comm**, int, UniqueId, int, Config*);
using CommSplit = Result (*)(Comm*, int, int, Comm**, Config*);
using CommGetAsyncError = Result (*)(Comm*, Result*);
using CommFinalize = Result (*)(Comm*);
using CommDestroy = Result (*)(Comm*);
using CommAbort = Result (*)(Comm*);
using Group = Result (*)();
using AllReduce = Result (*)(const void*, void*, std::size_t, DataType, RedOp, Comm*, Stream);
using Broadcast = Result (*)(const void*, void*, std::size_t, DataType, int, Comm*, Stream);
using Reduce = Result (*)(const void*, void*, std::size_t, DataType, RedOp, int, Comm*, Stream);
using ReduceScatter = AllReduce;
using AllGather = Result (*)(const void*, void*, std::size_t, DataType, Comm*, Stream);
using Send = Result (*)(const void*, std::size_t, DataType, int, Comm*, Stream);
using Recv = Result (*)(void*, std::size_t, DataType, int, Comm*, Stream);
using AllReduceConfig = Result (*)(const void*, void*, std::size_t, DataType, RedOp, Comm*, Stream, const CollConfig*);
using BroadcastConfig = Result (*)(const void*, void*, std::size_t, DataType, int, Comm*, Stream, const CollConfig*);
using ReduceConfig = Result (*)(const void*, void*, std::size_t, DataType, RedOp, int, Comm*, Stream,
                                const CollConfig*);
using ReduceScatterConfig = AllReduceConfig;
using MemAlloc = Result (*)(void**, std::size_t);
using MemFree = Result (*)(void*);
using CommWindowRegister = Result (*)(Comm*, void*, std::size_t, Window*, int);
using CommWindowDeregister = Result (*)(Comm*, Window);
using GetPeerDevicePointer = Result (*)(Window, std::size_t, int, void**);
using AllGatherConfig = Result (*)(const void*, void*, std::size_t, DataType, Comm*, Stream, const CollConfig*);
}

}  // namespace pycomm::nccl::abi
