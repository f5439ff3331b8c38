// What pycomm's all-reduce kernels do between ranks, over memory that processes share: they meet at pads, with a
// deadline and an abort word, and say whom they waited for in vain. Their sums are the stand-in's.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "nccl/kernel_groups.hpp"
#include "world.hpp"

using namespace standin;
using pycomm::nccl::KernelStatus;

namespace {

struct Pad {
  std::atomic<std::uint32_t> epoch;
  std::atomic<std::uint32_t> abort;
};
constexpr std::size_t kStagingAt = 64;

struct Ranks {
  std::vector<char*> parts;  // of the memory that begins with the pad
  int rank;
  KernelStatus* status;
  int timeout_ms;

  Pad& pad(int of) const { return *reinterpret_cast<Pad*>(parts[static_cast<std::size_t>(of)]); }

  bool give_up(std::uint32_t code, int waited_for, std::uint32_t expected) const {
    status->rank = waited_for;
    status->expected = expected;
    status->seen = pad(waited_for).epoch;
    std::atomic_ref(status->code).store(code, std::memory_order_release);
    for (int of = 0; of < static_cast<int>(parts.size()); ++of) pad(of).abort = 1;
    return false;
  }

  bool meet() const {
    const std::uint32_t expected = ++pad(rank).epoch;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    for (int of = 0; of < static_cast<int>(parts.size()); ++of) {
      while (pad(of).epoch < expected) {
        if (pad(rank).abort != 0) return give_up(2, of, expected);
        if (std::chrono::steady_clock::now() > deadline) return give_up(1, of, expected);
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    }
    return pad(rank).abort == 0;
  }
};

}  // namespace

extern "C" {

/// `data`: every rank's tensor, or, for one step, this rank's alone.
void standin_all_reduce(CUstream_st* stream, char* const* parts, int rank, int size, char* const* data, int one_shot,
                        std::size_t count, int type, int op, void* status, int timeout_ms) {
  const Ranks ranks{{parts, parts + size}, rank, static_cast<KernelStatus*>(status), timeout_ms};
  const auto n = static_cast<std::size_t>(size);
  const std::vector<char*> tensors(data, data + (one_shot != 0 ? 1 : n));
  const auto element = static_cast<DataType>(type);
  const std::size_t bytes = size_of(element);
  stream->push([=] {
    if (one_shot != 0) {
      std::memcpy(ranks.parts[static_cast<std::size_t>(rank)] + kStagingAt, tensors[0], count * bytes);
      if (!ranks.meet()) return;
      std::vector<const char*> staged;
      for (char* const part : ranks.parts) staged.push_back(part + kStagingAt);
      reduce_values(tensors[0], staged, count, element, static_cast<RedOp>(op));
    } else {
      if (!ranks.meet()) return;
      const std::size_t first = count * static_cast<std::size_t>(rank) / n;
      const std::size_t num = count * (static_cast<std::size_t>(rank) + 1) / n - first;
      std::vector<const char*> sources;
      for (char* const tensor : tensors) sources.push_back(tensor + first * bytes);
      std::vector<char> sums(num * bytes);
      reduce_values(sums.data(), sources, num, element, static_cast<RedOp>(op));
      for (char* const tensor : tensors) std::copy(sums.begin(), sums.end(), tensor + first * bytes);
    }
    ranks.meet();
  });
}
}
