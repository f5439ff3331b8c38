// Reduce-scatter. n ranks, S bytes of input.
//
// Direct: rank r reads part r of every rank's input, in rank order, and reduces it into its output, slice by slice
// (rounds.hpp). Steps: 2 with symmetric inputs, else 1 a slice. Touched a rank: S + S/n, plus 2(n-1)/n·S where an
// ordinary input is copied through staging.
//
// Ordering. In place, the output is part r of rank r's input, which no other rank reads.
#include <array>

#include "host/collectives.hpp"
#include "host/reduce.hpp"
#include "host/rounds.hpp"

namespace pycomm::host {

void reduce_scatter(Group& group, const Call& call, const Operands& operands) {
  const int n = group.world_size();
  const bool is_small = call.bytes() * static_cast<std::size_t>(n) <= group.tuning().one_shot_bytes;
  Rounds rounds(group, operands.input, call.dtype, {{operands.input_parts}, Readers::kOneAPart}, is_small);
  const Entry entry(group, call, {rounds.location(), {}}, [&] { rounds.show(0); });
  const ReduceKernel reduce = reduce_kernel(call.dtype, call.reduce_op);
  rounds.run([&](std::uint64_t k) {
    const std::size_t length = rounds.length(group.rank(), k);
    if (length == 0) return;
    std::array<const void*, kMaxRanks> sources;
    for (int r = 0; r < n; ++r) sources[static_cast<std::size_t>(r)] = rounds.data(r, k);
    void* output = static_cast<std::byte*>(operands.output) + rounds.begin(group.rank(), k) * size_of(call.dtype);
    reduce(sources.data(), n, &output, 1, length);
  });
}

}  // namespace pycomm::host
