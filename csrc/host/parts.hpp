// How a tensor is cut into one part a rank: the splits of reduce_scatter, all_gather and all_to_all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "pycomm/types.hpp"

namespace pycomm::host {

/// Parts that lie one after the other; counts and starts in elements.
class Parts {
 public:
  Parts() = default;  // none
  explicit Parts(std::vector<std::uint64_t> counts) : counts_(std::move(counts)) {
    starts_.reserve(counts_.size());
    for (const std::uint64_t count : counts_) {
      starts_.push_back(total_);
      total_ += count;
    }
  }

  int num_parts() const { return static_cast<int>(counts_.size()); }
  std::uint64_t count(int part) const { return counts_[static_cast<std::size_t>(part)]; }
  std::uint64_t start(int part) const { return starts_[static_cast<std::size_t>(part)]; }
  std::uint64_t total() const { return total_; }

  /// For Call::splits: 0 if all parts are equal, else FNV-1a of the counts.
  std::uint64_t hash() const {
    if (std::adjacent_find(counts_.begin(), counts_.end(), std::not_equal_to<>()) == counts_.end()) return 0;
    std::uint64_t hash = 0xcbf29ce484222325;
    for (const std::uint64_t count : counts_) {
      for (int shift = 0; shift < 64; shift += 8) hash = (hash ^ (count >> shift & 0xff)) * 0x100000001b3;
    }
    return std::max<std::uint64_t>(hash, 1);
  }

 private:
  std::vector<std::uint64_t> counts_;
  std::vector<std::uint64_t> starts_;
  std::uint64_t total_ = 0;
};

/// The memory of one rank in a call that is not in place; a side that this rank does not have is nullptr.
struct Tensors {
  const void* input = nullptr;
  void* output = nullptr;
  DType dtype = DType::kUInt8;
};

}  // namespace pycomm::host
