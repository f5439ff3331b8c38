// A row of bytes from every rank to every rank: what ranks agree on before they go on, the library's own steps
// (segments, splits) and Communicator::agree.
#pragma once

#include <stdexcept>
#include <type_traits>
#include <vector>

#include "host/group.hpp"

namespace pycomm::host {

inline constexpr std::size_t kMostAgreedBytes = 16 * 1024;  // at most a staging buffer

/// Returns the rows of all ranks, by rank, as a step of `call`. One step through the call slots. T is trivially
/// copyable; every rank's row has the length that equal calls imply.
template <class T>
std::vector<T> agree(Group& group, const Call& call, const T* mine, std::size_t length) {
  static_assert(std::is_trivially_copyable_v<T>);
  const std::size_t bytes = length * sizeof(T);
  if (bytes > kMostAgreedBytes) {
    throw std::invalid_argument("a row of " + std::to_string(bytes) + " bytes: ranks agree on " +
                                std::to_string(kMostAgreedBytes) + " at most; larger data are all_gather's");
  }
  const Entry entry(group, call, {}, [&] { group.put_payload(mine, bytes); });
  std::vector<T> all(length * static_cast<std::size_t>(group.world_size()));
  for (int r = 0; r < group.world_size() && bytes != 0; ++r) {
    std::memcpy(&all[length * static_cast<std::size_t>(r)], group.payload(r, bytes), bytes);
  }
  return all;
}

/// The same of one T a rank.
template <class T>
std::vector<T> agree(Group& group, const Call& call, const T& mine) {
  return agree(group, call, &mine, 1);
}

/// The same as a step of the library's own.
template <class T>
std::vector<T> agree(Group& group, const T& mine) {
  return agree(group, Call{.kind = OpKind::kAgree, .count = sizeof(T), .splits = sizeof(T)}, mine);
}

}  // namespace pycomm::host
