// All-to-all. n ranks, S bytes of input.
//
// Direct: rank r copies its part of every rank's input into its output, slice by slice (rounds.hpp). Steps: 2 with
// symmetric inputs, else 1 a slice; by splits one more, in which all ranks learn all splits. Touched a rank: 2·S, plus
// 2(n-1)/n·S where an ordinary input is copied through staging.
//
// Ordering. Input and output are different memory, so all is said in rounds.hpp.
#include <algorithm>

#include "host/agree.hpp"
#include "host/collectives.hpp"
#include "host/rounds.hpp"

namespace pycomm::host {

namespace {

std::string list(const Parts& parts) {
  std::string text;
  for (int p = 0; p < parts.num_parts(); ++p) text += (p == 0 ? "" : ", ") + std::to_string(parts.count(p));
  return "[" + text + "]";
}

[[noreturn]] void throw_mismatch(const std::vector<Parts>& inputs, const std::vector<Parts>& outputs,
                                 const std::string& what) {
  Error error(ErrorKind::kMismatch, "all_to_all by splits: " + what + " (elements). Nothing was written");
  for (std::size_t r = 0; r < inputs.size(); ++r) {
    error.calls.push_back("all_to_all(elements out " + list(outputs[r]) + ", in " + list(inputs[r]) + ")");
  }
  throw error;
}

void check_pairs(const std::vector<Parts>& inputs, const std::vector<Parts>& outputs) {
  const int n = static_cast<int>(inputs.size());
  std::string what;
  for (int s = 0; s < n; ++s) {
    for (int d = 0; d < n; ++d) {
      const std::uint64_t sent = inputs[static_cast<std::size_t>(s)].count(d);
      const std::uint64_t expected = outputs[static_cast<std::size_t>(d)].count(s);
      if (sent == expected) continue;
      what += (what.empty() ? "rank " : "; rank ") + std::to_string(s) + " has " + std::to_string(sent) + " for rank " +
              std::to_string(d) + ", which expects " + std::to_string(expected);
    }
  }
  if (!what.empty()) throw_mismatch(inputs, outputs, what);
}

/// All ranks learn all splits: the layouts of every rank's input, which all outputs fit.
std::vector<Parts> learn_inputs(Group& group, const Call& call, const Operands& operands) {
  std::vector<std::uint64_t> mine;
  for (const Parts* const parts : {&operands.input_parts, &operands.output_parts}) {
    for (int p = 0; p < parts->num_parts(); ++p) mine.push_back(parts->count(p));
  }
  const std::vector<std::uint64_t> all = agree(group, call, mine.data(), mine.size());
  const auto n = static_cast<std::ptrdiff_t>(group.world_size());
  std::vector<Parts> inputs;
  std::vector<Parts> outputs;
  for (auto counts = all.begin(); counts != all.end(); counts += 2 * n) {
    inputs.emplace_back(std::vector<std::uint64_t>(counts, counts + n));
    outputs.emplace_back(std::vector<std::uint64_t>(counts + n, counts + 2 * n));
  }
  check_pairs(inputs, outputs);
  return inputs;
}

}  // namespace

void all_to_all(Group& group, const Call& call, const Operands& operands) {
  const bool by_splits = call.splits != 0;
  const std::size_t element_bytes = size_of(call.dtype);
  auto inputs = by_splits ? learn_inputs(group, call, operands) : std::vector<Parts>{operands.input_parts};
  Shown shown{std::move(inputs), Readers::kOneAPart};
  std::uint64_t most = 0;
  std::uint64_t all = 0;
  for (int r = 0; r < group.world_size(); ++r) {
    most = std::max(most, shown.of(r).total());
    all += shown.of(r).total();
  }
  const std::size_t n = static_cast<std::size_t>(group.world_size());
  const bool is_small = most * element_bytes * n <= group.tuning().one_shot_bytes;
  Rounds rounds(group, operands.input, call.dtype, std::move(shown), is_small);
  const Entry entry(group, call, {rounds.location(), {}}, [&] { rounds.show(0); });
  const bool around_caches = group.around_caches(2 * all * element_bytes);
  rounds.run([&](std::uint64_t k) {
    for (int i = 0; i < group.world_size(); ++i) {
      const int r = (group.rank() + i) % group.world_size();
      rounds.copy(r, k, static_cast<std::byte*>(operands.output) + operands.output_parts.start(r) * element_bytes,
                  around_caches);
    }
  });
}

}  // namespace pycomm::host
