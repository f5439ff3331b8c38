// How much memory this process can still have: what the host has free, and what every memory cgroup that the process
// is in, of version 1 or 2, still grants. Beyond the first an allocation swaps; beyond the others the kernel ends
// processes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pycomm::host {

struct MemoryLimit {
  static constexpr std::uint64_t kHost = 0;

  std::uint64_t id;    // of a cgroup, the same for all processes in it; kHost: of the whole host
  std::uint64_t left;  // bytes, those counted that the kernel could drop
};

/// All limits that are set. `root`: another folder in place of "/", for tests.
std::vector<MemoryLimit> memory_limits(const std::string& root = "");

}  // namespace pycomm::host
