// Rounds: the engine of the pull collectives, in which every rank shows its input and reads what it needs of others'.
//
// A rank's input is cut into parts. Either each part has one reader, its own rank's part none (reduce_scatter,
// all_to_all, scatter), or there is one part that everyone reads (all_gather, gather). Round k of K moves slice k of
// every part:
//   show(k)    copy slice k of one's parts into staging k % 2, unless they are symmetric and read where they lie
//   phase k    everyone's slice k can be read (k = 0: the entry)
//   read(k)    read slice k of the parts meant for this rank
// One synchronisation a slice. Where all inputs are symmetric there is one round and nothing is copied. Small messages
// are always staged: a round of their own and no exit phase.
//
// Ordering. A rank signals phase k after its read(k - 1). So when it has seen phase k of everyone, all reads of slice
// k - 1 are done, and it may write slice k + 1 into the same buffer.
//   Between calls: call s + 1 puts its slice 0, before its entry, where the odd slices of call s were, and its slice 1,
// after its entry, where the even ones were. K is odd. So the reads of the last odd slice, K - 2, were done at phase
// K - 1, which this rank has seen; and those of slice K - 1 are done when their ranks enter call s + 1. Hence staging
// needs no exit phase. Peers that read the tensor itself do: everyone waits for phase K before the caller may have it.
#pragma once

#include <vector>

#include "host/group.hpp"
#include "pycomm/parts.hpp"

namespace pycomm::host {

enum class Readers { kOneAPart, kEveryone };

/// What every rank shows: one layout for all of them, or one each.
struct Shown {
  std::vector<Parts> layouts;
  Readers readers;

  const Parts& of(int rank) const { return layouts[layouts.size() == 1 ? 0 : static_cast<std::size_t>(rank)]; }
};

class Rounds {
 public:
  /// `is_small`: on all ranks alike, so that ranks agree on the rounds.
  Rounds(Group& group, const void* input, DType dtype, Shown shown, bool is_small);
  Rounds(const Rounds&) = delete;  // lives as long as its call
  Rounds& operator=(const Rounds&) = delete;

  /// Where this rank's input lies, for its Entry.
  const Location& location() const { return location_; }
  void show(std::uint64_t k) const;

  /// Inside the call's Entry, after show(0): all rounds. `read(k)` reads slice k of what is meant for this rank.
  template <class Read>
  void run(const Read& read) {
    find_inputs();
    for (std::uint64_t k = 0; k < num_rounds_; ++k) {
      if (k > 0) group_.wait(k);
      read(k);
      if (k + 1 < num_rounds_) {
        show(k + 1);
        group_.signal(k + 1);
      }
    }
    if (!any_symmetric_) return;
    group_.signal(num_rounds_);
    group_.wait(num_rounds_);
  }

  /// Slice k of the part of rank `source` that this rank reads, where it lies now.
  const std::byte* data(int source, std::uint64_t k) const;
  std::size_t begin(int source, std::uint64_t k) const { return slice(source, part_read_, k).begin; }
  std::size_t length(int source, std::uint64_t k) const { return slice(source, part_read_, k).length; }
  /// Copy it into `part`, where the whole part shall lie; does nothing where it lies there already.
  void copy(int source, std::uint64_t k, std::byte* part, bool around_caches) const;

 private:
  struct Slice {
    std::size_t begin;  // elements into the part
    std::size_t length;
  };

  /// Elements of a part of `count` that are shown in one round; whole cache lines if there is more than one.
  std::size_t width(std::uint64_t count) const;
  Slice slice(int source, int part, std::uint64_t k) const;
  bool is_shown(int source, int part) const { return shown_.readers == Readers::kEveryone || part != source; }
  std::uint64_t num_shown(int source) const;
  void find_inputs();

  Group& group_;
  const std::byte* input_;
  std::size_t element_bytes_;
  Shown shown_;
  int part_read_;
  Location location_;
  std::uint64_t num_rounds_ = 1;
  bool any_symmetric_ = false;
  std::vector<const std::byte*> inputs_;      // by rank; nullptr: ordinary, seen through staging
  std::vector<std::size_t> staging_offsets_;  // by rank: bytes, of what this rank reads in its staging buffer
};

}  // namespace pycomm::host
