// NCCL, loaded at run time: its functions by name, the newer ones only where the library has them.
#pragma once

#include <string>
#include <vector>

#include "nccl/abi.hpp"
#include "pycomm/shared_library.hpp"

namespace pycomm::nccl {

/// "2.28.9" of 22809; before 2.9 the factors were a tenth: 2804 is 2.8.4.
std::string version_text(int code);

class Library {
 public:
  static constexpr int kOldest = abi::version_code(2, 18, 0);  // ncclCommSplit

  /// Names as SharedLibrary takes them. Throws kUnavailable: there is none, or it is too old.
  explicit Library(const std::vector<std::string>& names);

  std::string file() const { return library_.file(); }
  int version() const { return version_; }
  /// Whether calls take a number of CTAs each (2.31).
  bool has_call_config() const { return version_ >= abi::version_code(2, 31, 0) && all_reduce_config != nullptr; }
  /// Whether ranks of an NVLink domain can have each other's addresses (2.29).
  bool has_windows() const {
    return mem_alloc != nullptr && mem_free != nullptr && comm_window_register != nullptr &&
           comm_window_deregister != nullptr && get_peer_device_pointer != nullptr;
  }
  /// "unhandled cuda error (ncclUnhandledCudaError): its last words", for messages.
  std::string describe(abi::Result result, abi::Comm* comm) const;

  abi::GetUniqueId get_unique_id;
  abi::CommInitRankConfig comm_init_rank_config;
  abi::CommSplit comm_split;
  abi::CommGetAsyncError comm_get_async_error;
  abi::CommFinalize comm_finalize;
  abi::CommDestroy comm_destroy;
  abi::CommAbort comm_abort;
  abi::Group group_start;
  abi::Group group_end;
  abi::AllReduce all_reduce;
  abi::Broadcast broadcast;
  abi::Reduce reduce;
  abi::ReduceScatter reduce_scatter;
  abi::AllGather all_gather;
  abi::Send send;
  abi::Recv recv;
  // nullptr before 2.31.
  abi::AllReduceConfig all_reduce_config;
  abi::BroadcastConfig broadcast_config;
  abi::ReduceConfig reduce_config;
  abi::ReduceScatterConfig reduce_scatter_config;
  abi::AllGatherConfig all_gather_config;
  // nullptr before 2.19, 2.27 and, the last, 2.29.
  abi::MemAlloc mem_alloc;
  abi::MemFree mem_free;
  abi::CommWindowRegister comm_window_register;
  abi::CommWindowDeregister comm_window_deregister;
  abi::GetPeerDevicePointer get_peer_device_pointer;

 private:
  SharedLibrary library_;
  int version_ = 0;
  abi::GetErrorString get_error_string_;
  abi::GetLastError get_last_error_;
};

}  // namespace pycomm::nccl
