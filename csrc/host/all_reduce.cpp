// All-reduce, and reduce, which is the same with one rank to write to. n ranks, S bytes.
//
// One-shot (n·S up to a threshold): every rank copies its tensor into its call slot, enters, and reduces all slots into
// its tensor. Steps: 1. Bytes touched a rank: (n+2)·S. No exit barrier: slots alternate (control.hpp).
//
// Push two-shot, in slices, double-buffered. Rank r owns part r of each slice:
//   phase 2k      every rank's slice k can be read (k = 0: the entry)
//   phase 2k + 1  rank r has reduced its part of slice k from every rank, in rank order, and written it to every rank,
//                 or to the root
// A symmetric tensor is read and written where it lies; when all are, the whole message is one slice: 2·S bytes touched
// a rank, whatever n is. An ordinary tensor goes through its rank's staging buffer, except the part that its own rank
// reduces: 4(n-1)/n·S + S + 2S/n. Both may occur in one call; the bits are the same.
//
// Ordering. Only rank r touches part r of anyone's slice k between phases 2k and 2k + 1, so reading and writing in
// place is safe. Staging buffer (k+1) % 2 was last used by slice k - 1: its readers and writers were done at phase
// 2(k-1) + 1 of every rank, which this rank has waited for before it copies slice k + 1 in. Nobody writes to a peer
// after its own phase 2(K-1) + 1, which everybody waits for before returning.
#include <algorithm>
#include <array>

#include "host/collectives.hpp"
#include "host/reduce.hpp"

namespace pycomm::host {

namespace {

using Pointers = std::array<void*, kMaxRanks>;

/// Elements [begin, end) of a slice of `count` elements that `rank` reduces; starts are cache lines apart.
struct Part {
  std::size_t begin;
  std::size_t end;
};
Part part_of(std::size_t count, int rank, int world_size, std::size_t element_bytes) {
  const std::size_t line = kCacheLine / element_bytes;
  const auto n = static_cast<std::size_t>(world_size);
  const std::size_t length = ((count + n - 1) / n + line - 1) / line * line;
  return {std::min(count, length * static_cast<std::size_t>(rank)),
          std::min(count, length * (static_cast<std::size_t>(rank) + 1))};
}

/// The rank that the result is written to, or Group::kEveryRank.
int only_destination(const Call& call) { return call.kind == OpKind::kReduce ? call.root : Group::kEveryRank; }

class TwoShot {
 public:
  TwoShot(const Group& group, std::byte* data, const Call& call, bool staged)
      : group_(group),
        only_to_(only_destination(call)),
        data_(data),
        count_(call.count),
        element_bytes_(size_of(call.dtype)),
        staged_(staged),
        reduce_(reduce_kernel(call.dtype, call.reduce_op)) {}

  /// Copy slice k, all but the part that this rank reduces itself, from the tensor to staging, or the result back.
  void copy_in(std::uint64_t k) { copy(k, true); }
  void copy_out(std::uint64_t k) {
    if (is_destination(group_.rank())) copy(k, false);
  }

  /// After the entry: where every rank's tensor lies, and so how many slices there are.
  void find_tensors() {
    bool all_symmetric = true;
    for (int r = 0; r < group_.world_size(); ++r) {
      tensors_[static_cast<std::size_t>(r)] = r == group_.rank() ? data_ : group_.symmetric_input(r);
      all_symmetric &= r == group_.rank() ? !staged_ : tensors_[static_cast<std::size_t>(r)] != nullptr;
    }
    if (all_symmetric) slice_count_ = count_;
  }
  std::uint64_t num_slices() const { return (count_ + slice_count_ - 1) / slice_count_; }

  /// Reduce this rank's part of slice k from everyone and write it to everyone, or to the root.
  void reduce_and_push(std::uint64_t k) {
    const Part part = part_of(slice_length(k), group_.rank(), group_.world_size(), element_bytes_);
    if (part.begin == part.end) return;
    Pointers parts;
    for (std::size_t r = 0; r < static_cast<std::size_t>(group_.world_size()); ++r) {
      std::byte* const tensor = tensors_[r];
      std::byte* const slice =
          tensor != nullptr ? tensor + k * slice_count_ * element_bytes_ : group_.staging(static_cast<int>(r), k);
      parts[r] = slice + part.begin * element_bytes_;
    }
    const bool to_all = only_to_ == Group::kEveryRank;
    void* const* const to = parts.data() + (to_all ? 0 : only_to_);
    reduce_(parts.data(), group_.world_size(), to, to_all ? group_.world_size() : 1, part.end - part.begin);
  }

 private:
  bool is_destination(int rank) const { return only_to_ == Group::kEveryRank || only_to_ == rank; }
  std::size_t slice_length(std::uint64_t k) const { return std::min(slice_count_, count_ - k * slice_count_); }

  void copy(std::uint64_t k, bool in) {
    if (!staged_) return;
    std::byte* const tensor = data_ + k * slice_count_ * element_bytes_;
    std::byte* const staging = group_.staging(group_.rank(), k);
    const std::size_t length = slice_length(k);
    const Part own = part_of(length, group_.rank(), group_.world_size(), element_bytes_);
    for (const Part part : {Part{0, own.begin}, Part{own.end, length}}) {
      const std::size_t offset = part.begin * element_bytes_;
      const std::size_t bytes = (part.end - part.begin) * element_bytes_;
      std::memcpy(in ? staging + offset : tensor + offset, in ? tensor + offset : staging + offset, bytes);
    }
  }

  const Group& group_;
  int only_to_;
  std::byte* data_;
  std::size_t count_;
  std::size_t element_bytes_;
  bool staged_;
  ReduceKernel reduce_;
  std::array<std::byte*, kMaxRanks>
      tensors_;  // nullptr: another rank's ordinary tensor, seen through its staging buffer
  std::size_t slice_count_ = group_.tuning().slice_bytes / element_bytes_;
};

void one_shot(Group& group, void* data, const Call& call) {
  const Entry entry(group, call, {}, [&] { group.put_payload(data, call.bytes()); });
  const int only_to = only_destination(call);
  if (only_to != Group::kEveryRank && only_to != group.rank()) return;
  Pointers sources;
  for (int r = 0; r < group.world_size(); ++r) {
    sources[static_cast<std::size_t>(r)] = group.payload(r, call.bytes());
  }
  reduce_kernel(call.dtype, call.reduce_op)(sources.data(), group.world_size(), &data, 1, call.count);
}

}  // namespace

void all_reduce(Group& group, const Call& call, const Operands& operands) {
  void* const data = operands.output;
  if (call.bytes() * static_cast<std::size_t>(group.world_size()) <= group.tuning().one_shot_bytes) {
    return one_shot(group, data, call);
  }
  const Location location = group.segments().locate(data, call.bytes());
  TwoShot two_shot(group, static_cast<std::byte*>(data), call, !location.symmetric());
  const Entry entry(group, call, {location, location}, [&] { two_shot.copy_in(0); });
  two_shot.find_tensors();
  const std::uint64_t num_slices = two_shot.num_slices();
  for (std::uint64_t k = 0; k < num_slices; ++k) {
    if (k > 0) group.wait(2 * k);
    two_shot.reduce_and_push(k);
    group.signal(2 * k + 1);
    if (k + 1 < num_slices) {
      two_shot.copy_in(k + 1);
      group.signal(2 * k + 2);
    }
    group.wait(2 * k + 1);
    two_shot.copy_out(k);
  }
}

}  // namespace pycomm::host
