// A few bytes from every rank to every rank, for the library's own agreements (segments, splits).
#pragma once

#include <type_traits>
#include <vector>

#include "host/group.hpp"

namespace pycomm::host {

/// Returns `mine` of every rank, by rank, as a step of `call`. One step through the call slots; T is at most a staging
/// buffer long.
template <class T>
std::vector<T> exchange(Group& group, const Call& call, const T& mine) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16 * 1024);
  const Entry entry(group, call, {}, [&] { group.put_payload(&mine, sizeof(T)); });
  std::vector<T> all(static_cast<std::size_t>(group.world_size()));
  for (int r = 0; r < group.world_size(); ++r) {
    std::memcpy(&all[static_cast<std::size_t>(r)], group.payload(r, sizeof(T)), sizeof(T));
  }
  return all;
}

/// The same as a step of the library's own.
template <class T>
std::vector<T> exchange(Group& group, const T& mine) {
  return exchange(group, Call{.kind = OpKind::kExchange, .count = sizeof(T)}, mine);
}

/// The same for as many 64-bit numbers as every rank has, as a step of `call`: the first rank's, the second's, ….
inline std::vector<std::uint64_t> exchange(Group& group, const Call& call, const std::vector<std::uint64_t>& mine) {
  const std::size_t bytes = mine.size() * sizeof(std::uint64_t);
  const Entry entry(group, call, {}, [&] { group.put_payload(mine.data(), bytes); });
  std::vector<std::uint64_t> all(mine.size() * static_cast<std::size_t>(group.world_size()));
  for (int r = 0; r < group.world_size(); ++r) {
    std::memcpy(&all[mine.size() * static_cast<std::size_t>(r)], group.payload(r, bytes), bytes);
  }
  return all;
}

}  // namespace pycomm::host
