// Scatter. n ranks, S bytes of input at the root.
//
// Every rank copies its part of the root's input into its output, slice by slice (rounds.hpp). Steps: 2 with a
// symmetric input, else 1 a slice. Touched: 2S/n a rank; plus 2(n-1)/n·S at the root where an ordinary input is copied
// through staging.
//
// Ordering. In place, the root's output is a part of its input that no other rank reads, and it is not copied.
#include "host/collectives.hpp"
#include "host/rounds.hpp"

namespace pycomm::host {

void scatter(Group& group, const Call& call, const Operands& operands) {
  const bool is_small = call.bytes() <= group.tuning().one_shot_bytes;
  const Parts nothing = Parts::even(0, group.world_size());
  Shown shown{std::vector<Parts>(static_cast<std::size_t>(group.world_size()), nothing), Readers::kOneAPart};
  shown.layouts[static_cast<std::size_t>(call.root)] = operands.input_parts;
  Rounds rounds(group, operands.input, call.dtype, std::move(shown), is_small);
  const Entry entry(group, call, {rounds.location(), {}}, [&] { rounds.show(0); });
  const bool around_caches = group.around_caches(2 * call.bytes());
  rounds.run(
      [&](std::uint64_t k) { rounds.copy(call.root, k, static_cast<std::byte*>(operands.output), around_caches); });
}

}  // namespace pycomm::host
