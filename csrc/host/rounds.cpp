#include "host/rounds.hpp"

#include <algorithm>

#include "host/copy.hpp"

namespace pycomm::host {

Rounds::Rounds(Group& group, const void* input, DType dtype, Shown shown, bool is_small)
    : group_(group),
      input_(static_cast<const std::byte*>(input)),
      element_bytes_(size_of(dtype)),
      shown_(std::move(shown)),
      part_read_(shown_.readers == Readers::kEveryone ? 0 : group.rank()) {
  if (group.world_size() == 1) return;
  std::uint64_t most = 0;
  for (int r = 0; r < group.world_size(); ++r) most = std::max(most, num_shown(r));
  if (!is_small && num_shown(group.rank()) != 0) {
    location_ = group.segments().locate(input_, shown_.of(group.rank()).total() * element_bytes_);
  }
  // Each part may be rounded up by a cache line in each round.
  const std::size_t room = group.tuning().slice_bytes - static_cast<std::size_t>(group.world_size()) * kCacheLine;
  num_rounds_ = (most * element_bytes_ + room - 1) / room | 1;
}

std::uint64_t Rounds::num_shown(int source) const {
  const Parts& parts = shown_.of(source);
  return parts.total() - (shown_.readers == Readers::kOneAPart ? parts.count(source) : 0);
}

std::size_t Rounds::width(std::uint64_t count) const {
  if (num_rounds_ == 1) return count;
  const std::size_t line = kCacheLine / element_bytes_;
  return ((count + num_rounds_ - 1) / num_rounds_ + line - 1) / line * line;
}

Rounds::Slice Rounds::slice(int source, int part, std::uint64_t k) const {
  const std::uint64_t count = shown_.of(source).count(part);
  const std::uint64_t begin = std::min(count, k * width(count));
  return {begin, std::min(count - begin, width(count))};
}

void Rounds::show(std::uint64_t k) const {
  const int rank = group_.rank();
  if (location_.symmetric() || group_.world_size() == 1) return;
  const Parts& parts = shown_.of(rank);
  std::byte* to = group_.staging(rank, k);
  for (int part = 0; part < parts.num_parts(); ++part) {
    if (!is_shown(rank, part)) continue;
    const Slice slice = this->slice(rank, part, k);
    if (slice.length != 0) {
      std::memcpy(to, input_ + (parts.start(part) + slice.begin) * element_bytes_, slice.length * element_bytes_);
    }
    to += width(parts.count(part)) * element_bytes_;
  }
}

void Rounds::find_inputs() {
  const auto n = static_cast<std::size_t>(group_.world_size());
  inputs_.assign(n, nullptr);
  staging_offsets_.assign(n, 0);
  bool all_symmetric = true;
  for (int r = 0; r < group_.world_size(); ++r) {
    if (num_shown(r) == 0) continue;
    inputs_[static_cast<std::size_t>(r)] = group_.symmetric_input(r);
    const bool symmetric = inputs_[static_cast<std::size_t>(r)] != nullptr;
    all_symmetric &= symmetric;
    any_symmetric_ |= symmetric;
  }
  if (all_symmetric) num_rounds_ = 1;
  inputs_[static_cast<std::size_t>(group_.rank())] = input_;
  for (int r = 0; r < group_.world_size(); ++r) {
    for (int part = 0; part < part_read_; ++part) {
      if (!is_shown(r, part)) continue;
      staging_offsets_[static_cast<std::size_t>(r)] += width(shown_.of(r).count(part)) * element_bytes_;
    }
  }
}

const std::byte* Rounds::data(int source, std::uint64_t k) const {
  const std::byte* const input = inputs_[static_cast<std::size_t>(source)];
  if (input == nullptr) return group_.staging(source, k) + staging_offsets_[static_cast<std::size_t>(source)];
  return input + (shown_.of(source).start(part_read_) + begin(source, k)) * element_bytes_;
}

void Rounds::copy(int source, std::uint64_t k, std::byte* part, bool around_caches) const {
  const Slice slice = this->slice(source, part_read_, k);
  std::byte* const to = part + slice.begin * element_bytes_;
  if (slice.length == 0) return;
  const std::byte* const from = data(source, k);
  if (from != to) host::copy(to, from, slice.length * element_bytes_, around_caches);
}

}  // namespace pycomm::host
