// NCCL's windows: memory is a file, which every rank maps once all have registered theirs.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "world.hpp"

using namespace standin;

namespace pycomm::nccl::abi {

struct WindowHandle {
  std::vector<void*> parts;
  std::size_t bytes;
};

}  // namespace pycomm::nccl::abi

namespace {

struct Memory {
  std::string path;
  std::size_t bytes;
};
std::mutex mutex;
std::map<void*, Memory> memories;
std::atomic<int> num_made = 0;
std::atomic<int> num_open = 0;

}  // namespace

extern "C" {

Result ncclMemAlloc(void** memory, std::size_t bytes) {
  const char* const folder = std::getenv("STANDIN_FOLDER");
  const std::string path = std::string(folder == nullptr ? "/tmp" : folder) + "/memory" + std::to_string(getpid()) +
                           "-" + std::to_string(num_made++);
  if (path.size() >= kPathBytes || std::getenv("STANDIN_NO_MEMORY") != nullptr) return kUnhandledCudaError;
  *memory = map_file(path, bytes);
  if (*memory == nullptr) return kUnhandledCudaError;
  const std::lock_guard lock(mutex);
  memories[*memory] = {path, bytes};
  return kSuccess;
}

Result ncclMemFree(void* memory) {
  const std::lock_guard lock(mutex);
  const auto found = memories.find(memory);
  if (found == memories.end()) return kInvalidArgument;
  munmap(memory, found->second.bytes);
  memories.erase(found);
  return kSuccess;
}

Result ncclCommWindowRegister(Comm* comm, void* memory, std::size_t bytes, Window* window, int flags) {
  const std::lock_guard lock(mutex);
  if (comm->state == kInProgress) return kInvalidUsage;
  if (flags != kWindowCollectiveSymmetric || !memories.contains(memory)) return kInvalidArgument;
  auto& meeting = comm->shared->windows[comm->num_windows++ % kMostWindows];
  std::strcpy(meeting.path[comm->rank], memories[memory].path.c_str());
  ++meeting.arrived;
  comm->start([=, &meeting] {
    if (meeting.arrived < comm->size) return kInProgress;
    auto* const opened = new WindowHandle{{}, bytes};
    for (int rank = 0; rank < comm->size; ++rank) {
      const bool mapped = rank != comm->rank && std::getenv("STANDIN_NO_NVLINK") == nullptr;
      opened->parts.push_back(mapped ? map_file(meeting.path[rank], bytes) : nullptr);
    }
    ++num_open;
    *window = opened;
    return kSuccess;
  });
  return kInProgress;
}

Result ncclCommWindowDeregister(Comm*, Window window) {
  for (void* const part : window->parts) {
    if (part != nullptr) munmap(part, window->bytes);
  }
  delete window;
  --num_open;
  return kSuccess;
}

Result ncclGetPeerDevicePointer(Window window, std::size_t offset, int rank, void** address) {
  char* const part = static_cast<char*>(window->parts[static_cast<std::size_t>(rank)]);
  *address = part == nullptr ? nullptr : part + offset;
  return kSuccess;
}

// For tests.

/// Windows that are registered, and memories that are not freed.
int standin_num_windows() { return num_open; }
int standin_num_memories() {
  const std::lock_guard lock(mutex);
  return static_cast<int>(memories.size());
}
}
