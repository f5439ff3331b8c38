// How a tensor is cut into one part a rank: the splits of reduce_scatter, all_gather and all_to_all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace pycomm {

/// Parts that lie one after the other; counts and starts in elements.
class Parts {
 public:
  Parts() = default;  // none
  explicit Parts(std::vector<std::uint64_t> counts)
      : num_parts_(static_cast<int>(counts.size())), counts_(std::move(counts)) {
    starts_.reserve(counts_.size());
    for (const std::uint64_t count : counts_) {
      starts_.push_back(total_);
      total_ += count;
    }
  }
  /// The usual ones, all of `count` elements: nothing to allocate.
  static Parts even(std::uint64_t count, int num_parts) {
    Parts parts;
    parts.num_parts_ = num_parts;
    parts.even_count_ = count;
    parts.total_ = count * static_cast<std::uint64_t>(num_parts);
    return parts;
  }

  int num_parts() const { return num_parts_; }
  std::uint64_t count(int part) const {
    return counts_.empty() ? even_count_ : counts_[static_cast<std::size_t>(part)];
  }
  std::uint64_t start(int part) const {
    return starts_.empty() ? even_count_ * static_cast<std::uint64_t>(part) : starts_[static_cast<std::size_t>(part)];
  }
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
  int num_parts_ = 0;
  std::uint64_t even_count_ = 0;
  std::uint64_t total_ = 0;
  std::vector<std::uint64_t> counts_;  // empty: all are even_count_
  std::vector<std::uint64_t> starts_;
};

}  // namespace pycomm
