// All-gather, and gather, which is the same with one reader. n ranks, S bytes of output.
//
// Push, where the outputs of all readers are symmetric: every rank writes its input into its part of each. Steps: 2.
// Touched a rank: S + S/n for all_gather, 2S/n for gather.
// Pull, otherwise: the readers copy every rank's input into their outputs, slice by slice (rounds.hpp). Steps: 2 with
// symmetric inputs, else 1 a slice. Touched by a reader: 2·S; plus 2S/n where an ordinary input is copied through
// staging.
//
// Ordering. Nobody but rank r writes part r of any output, so inputs in place stay what they are. Push: outputs are
// written between the entry and phase 1, which everyone waits for before returning.
#include <algorithm>

#include "host/collectives.hpp"
#include "host/copy.hpp"
#include "host/rounds.hpp"

namespace pycomm::host {

namespace {

/// What each rank shows: its part, to everyone; the only reader shows nothing.
Shown parts_of_ranks(const Parts& parts, int reader) {
  Shown shown{{}, Readers::kEveryone};
  shown.layouts.reserve(static_cast<std::size_t>(parts.num_parts()));
  for (int r = 0; r < parts.num_parts(); ++r) {
    shown.layouts.push_back(Parts::even(r == reader ? 0 : parts.count(r), 1));
  }
  return shown;
}

}  // namespace

void all_gather(Group& group, const Call& call, const Operands& operands) {
  const Parts& parts = operands.output_parts;
  const int reader = call.kind == OpKind::kGather ? call.root : Group::kEveryRank;  // the only rank with an output
  const int rank = group.rank();
  const auto reads = [&](int r) { return reader == Group::kEveryRank || reader == r; };
  const std::size_t element_bytes = size_of(call.dtype);
  const std::size_t output_bytes = parts.total() * element_bytes;
  const std::size_t own_bytes = parts.count(rank) * element_bytes;
  const std::size_t num_readers = reader == Group::kEveryRank ? static_cast<std::size_t>(group.world_size()) : 1;
  const bool around_caches = group.around_caches((num_readers + 1) * output_bytes);
  auto* const output = static_cast<std::byte*>(operands.output);
  const auto part_of = [&](std::byte* whole, int r) { return whole + parts.start(r) * element_bytes; };
  const auto copy_own_to = [&](std::byte* whole) {
    std::byte* const part = part_of(whole, rank);
    if (part != operands.input) copy(part, operands.input, own_bytes, around_caches);
  };

  const bool is_small = output_bytes <= group.tuning().one_shot_bytes;
  Rounds rounds(group, operands.input, call.dtype, parts_of_ranks(parts, reader), is_small);
  const Location target = reads(rank) && !is_small ? group.segments().locate(output, output_bytes) : Location{};
  const Entry entry(group, call, {rounds.location(), target}, [&] { rounds.show(0); });

  bool can_push = true;
  for (int r = 0; r < group.world_size(); ++r) can_push &= !reads(r) || group.symmetric_output(r) != nullptr;
  if (can_push) {
    for (int i = 0; i < group.world_size(); ++i) {
      const int r = (rank + i) % group.world_size();  // everyone starts elsewhere
      if (reads(r)) copy_own_to(group.symmetric_output(r));
    }
    group.signal(1);
    return group.wait(1);
  }
  rounds.run([&](std::uint64_t k) {
    if (!reads(rank)) return;
    if (k == 0 && reader == rank) copy_own_to(output);  // it shows nothing, so its rounds have nothing of its own
    for (int i = 0; i < group.world_size(); ++i) {
      const int r = (rank + i) % group.world_size();
      rounds.copy(r, k, part_of(output, r), around_caches);
    }
  });
}

}  // namespace pycomm::host
