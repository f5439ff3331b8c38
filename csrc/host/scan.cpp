// Scan: rank r ends with the reduction of the tensors of ranks 0 … r, in rank order. n ranks, S bytes.
//
// Pull, in slices through staging (rounds.hpp), also of symmetric tensors: every rank writes its own tensor while ranks
// behind it still read what that held. Steps: 1 a slice. Touched by rank r: (r + 4)·S, the copy into staging included.
//
// Ordering. Rounds' own: a rank writes its tensor alone, and nobody else reads or writes that.
#include <array>

#include "host/collectives.hpp"
#include "host/reduce.hpp"
#include "host/rounds.hpp"

namespace pycomm::host {

void scan(Group& group, const Call& call, const Operands& operands) {
  constexpr bool kIsStaged = true;
  const int rank = group.rank();
  Rounds rounds(group, operands.input, call.dtype, {{Parts::even(call.count, 1)}, Readers::kEveryone}, kIsStaged);
  const Entry entry(group, call, {}, [&] { rounds.show(0); });
  const ReduceKernel reduce = reduce_kernel(call.dtype, call.reduce_op);
  rounds.run([&](std::uint64_t k) {
    const std::size_t length = rounds.length(rank, k);
    if (length == 0) return;
    std::array<const void*, kMaxRanks> sources;
    for (int r = 0; r <= rank; ++r) sources[static_cast<std::size_t>(r)] = rounds.data(r, k);
    void* const to = static_cast<std::byte*>(operands.output) + rounds.begin(rank, k) * size_of(call.dtype);
    reduce(sources.data(), rank + 1, &to, 1, length);
  });
}

}  // namespace pycomm::host
