// strict=True: reject on the host what NCCL would hang on. NCCL wants one order of calls over all communicators of a
// process; here communicators are independent, so ranks that issue A, B and B, A get along.
//
// Each process numbers its calls per peer process, over all communicators that contain the peer. For every call, the
// number that rank i gave it for rank j must be the one that rank j gave it for rank i; otherwise another call lies
// between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pycomm::host {

/// Random, the same for the life of this process, another one in a forked child.
std::uint64_t process_token();

/// The issue number of the next call for each of these processes; counts it as issued. Thread-safe.
std::vector<std::uint32_t> next_issue(const std::vector<std::uint64_t>& tokens);

/// Take back one number for each: the call was issued here, but not everyone entered it.
void forget_issue(const std::vector<std::uint64_t>& tokens);

/// From the kernel's generator.
void fill_random(void* data, std::size_t bytes);

}  // namespace pycomm::host
