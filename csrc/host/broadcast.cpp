// Broadcast. n ranks, S bytes.
//
// Up to a threshold the root's tensor rides in its call slot: 1 step, no exit barrier. A symmetric tensor of the root
// is read where it lies by all others at once: 2 steps, 2·S bytes touched a rank. Of a large one the root writes the
// last S/n bytes into each tensor that is symmetric itself, whose rank reads the rest meanwhile: 2(n-1)/n·S touched a
// rank.
//   all:    phase 1       this rank has read, or written, its share
// An ordinary one is copied through the root's two staging buffers in slices: 4·S at the root and 2·S elsewhere,
// overlapped.
//   root:   phase 2k      slice k can be read (k = 0: the entry)
//   others: phase 2k + 1  slice k has been read
//
// Ordering. In place, nobody but its own rank and the root writes to a tensor, and these two to separate bytes;
// everyone who is written to waits for the root's phase, and the root for everyone's. In slices, the root overwrites
// staging (k+1) % 2, and returns to its caller, only after everyone's phase for the slice that lay there.
#include <algorithm>

#include "host/collectives.hpp"
#include "host/copy.hpp"

namespace pycomm::host {

namespace {

void through_slot(Group& group, void* data, const Call& call) {
  const bool is_root = group.rank() == call.root;
  const Entry entry(group, call, {}, [&] { group.put_payload(data, is_root ? call.bytes() : 0); });
  if (!is_root) std::memcpy(data, group.payload(call.root, call.bytes()), call.bytes());
}

constexpr std::size_t kSharedBytes = 32 * 1024;  // below, a second flag costs more than half of the copy

/// Bytes at the end of the tensor that the root writes to those whose tensors are symmetric.
std::size_t share_of_root(const Group& group, std::size_t bytes) {
  if (bytes < kSharedBytes) return 0;
  return bytes / static_cast<std::size_t>(group.world_size()) / kCacheLine * kCacheLine;
}

void root_in_place(Group& group, const std::byte* data, const Call& call) {
  const std::size_t share = share_of_root(group, call.bytes());
  const std::size_t start = call.bytes() - share;
  for (int i = 1; share != 0 && i < group.world_size(); ++i) {
    std::byte* const tensor = group.symmetric_output((group.rank() + i) % group.world_size());
    if (tensor != nullptr) copy(tensor + start, data + start, share, group.message_around_caches(call.bytes()));
  }
  group.signal(1);
  group.wait(1);
}

void others_in_place(Group& group, std::byte* data, const std::byte* source, const Call& call) {
  const bool is_symmetric = group.symmetric_output(group.rank()) != nullptr;
  const std::size_t share = is_symmetric ? share_of_root(group, call.bytes()) : 0;
  copy(data, source, call.bytes() - share, group.message_around_caches(call.bytes()));
  group.signal(1);
  if (share != 0) group.wait(1, call.root);
}

void copy_in(const Group& group, const std::byte* data, const Call& call, std::uint64_t k) {
  const std::size_t slice = group.tuning().slice_bytes;
  std::memcpy(group.staging(group.rank(), k), data + k * slice, std::min<std::size_t>(slice, call.bytes() - k * slice));
}

void root_in_slices(Group& group, const std::byte* data, const Call& call) {
  const std::uint64_t num_slices = (call.bytes() + group.tuning().slice_bytes - 1) / group.tuning().slice_bytes;
  for (std::uint64_t k = 1; k < num_slices; ++k) {
    if (k >= 2) group.wait(2 * (k - 2) + 1);
    copy_in(group, data, call, k);
    group.signal(2 * k);
  }
  group.wait(2 * (num_slices - 1) + 1);
}

void others_in_slices(Group& group, std::byte* data, const Call& call) {
  const std::size_t slice = group.tuning().slice_bytes;
  const std::size_t bytes = call.bytes();
  const std::uint64_t num_slices = (bytes + slice - 1) / slice;
  for (std::uint64_t k = 0; k < num_slices; ++k) {
    if (k > 0) group.wait(2 * k, call.root);
    copy(data + k * slice, group.staging(call.root, k), std::min(slice, bytes - k * slice),
         group.message_around_caches(bytes));
    group.signal(2 * k + 1);
  }
}

}  // namespace

void broadcast(Group& group, const Call& call, const Operands& operands) {
  const int root = call.root;
  if (call.bytes() * static_cast<std::size_t>(group.world_size()) <= group.tuning().one_shot_bytes) {
    return through_slot(group, operands.output, call);
  }
  auto* const tensor = static_cast<std::byte*>(operands.output);
  const bool is_root = group.rank() == root;
  const Location location = group.segments().locate(tensor, call.bytes());
  const Entry entry(group, call, {location, location}, [&] {
    if (is_root && !location.symmetric()) copy_in(group, tensor, call, 0);
  });
  if (const std::byte* const source = group.symmetric_input(root); source != nullptr) {
    return is_root ? root_in_place(group, tensor, call) : others_in_place(group, tensor, source, call);
  }
  return is_root ? root_in_slices(group, tensor, call) : others_in_slices(group, tensor, call);
}

}  // namespace pycomm::host
