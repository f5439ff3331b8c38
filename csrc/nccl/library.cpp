#include "nccl/library.hpp"

#include "pycomm/error.hpp"

namespace pycomm::nccl {

std::string version_text(int code) {
  const int factor = code >= 10000 ? 10000 : 1000;
  const int rest = code % factor;
  return std::to_string(code / factor) + "." + std::to_string(rest / 100) + "." + std::to_string(rest % 100);
}

Library::Library(const std::vector<std::string>& names) : library_("NCCL", names) {
  abi::GetVersion get_version = nullptr;
  library_.get(get_version, "ncclGetVersion");
  if (const abi::Result result = get_version(&version_); result != abi::kSuccess) {
    throw Error(ErrorKind::kUnavailable,
                "NCCL at " + file() + ": ncclGetVersion returns " + std::to_string(static_cast<int>(result)));
  }
  if (version_ < kOldest) {
    throw Error(ErrorKind::kUnavailable, "NCCL at " + file() + " is " + version_text(version_) + ", pycomm needs " +
                                             version_text(kOldest) + " or newer");
  }
  library_.get(get_unique_id, "ncclGetUniqueId");
  library_.get(comm_init_rank_config, "ncclCommInitRankConfig");
  library_.get(comm_split, "ncclCommSplit");
  library_.get(comm_get_async_error, "ncclCommGetAsyncError");
  library_.get(comm_finalize, "ncclCommFinalize");
  library_.get(comm_destroy, "ncclCommDestroy");
  library_.get(comm_abort, "ncclCommAbort");
  library_.get(group_start, "ncclGroupStart");
  library_.get(group_end, "ncclGroupEnd");
  library_.get(all_reduce, "ncclAllReduce");
  library_.get(broadcast, "ncclBroadcast");
  library_.get(reduce, "ncclReduce");
  library_.get(reduce_scatter, "ncclReduceScatter");
  library_.get(all_gather, "ncclAllGather");
  library_.get(send, "ncclSend");
  library_.get(recv, "ncclRecv");
  library_.get(get_error_string_, "ncclGetErrorString");
  library_.get(get_last_error_, "ncclGetLastError");
  library_.get_optional(all_reduce_config, "ncclAllReduceConfig");
  library_.get_optional(broadcast_config, "ncclBroadcastConfig");
  library_.get_optional(reduce_config, "ncclReduceConfig");
  library_.get_optional(reduce_scatter_config, "ncclReduceScatterConfig");
  library_.get_optional(all_gather_config, "ncclAllGatherConfig");
  library_.get_optional(mem_alloc, "ncclMemAlloc");
  library_.get_optional(mem_free, "ncclMemFree");
  library_.get_optional(comm_window_register, "ncclCommWindowRegister");
  library_.get_optional(comm_window_deregister, "ncclCommWindowDeregister");
  library_.get_optional(get_peer_device_pointer, "ncclGetPeerDevicePointer");
}

std::string Library::describe(abi::Result result, abi::Comm* comm) const {
  const std::string last = get_last_error_(comm);
  return std::string(get_error_string_(result)) + (last.empty() ? "" : ": " + last);
}

}  // namespace pycomm::nccl
