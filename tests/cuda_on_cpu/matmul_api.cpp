// Overlapped products of several ranks as C functions for ctypes (test_matmul.py): the driver that GPUs get, with a
// plain product in place of cuBLASLt, and a mailbox in place of NCCL.
#include <deque>
#include <map>
#include <vector>

#include "cuda/matmul/overlapped_matmul.hpp"
#include "cuda/runtime/stream_flags.hpp"
#include "guarded.hpp"

using namespace pycomm;        // NOLINT: a test program
using namespace pycomm::cuda;  // NOLINT
using cuda_on_cpu::guarded;

// Steps of streams here; drivers' in csrc/cuda/runtime/driver.cpp.
void pycomm::cuda::set_flag(Stream stream, std::uint32_t* flag, std::uint32_t value) {
  cuda_on_cpu::enqueue_step(stream, [=] {
    *flag = value;
    return true;
  });
}
void pycomm::cuda::await_flag(Stream stream, std::uint32_t* flag, std::uint32_t value) {
  cuda_on_cpu::enqueue_step(stream, [=] { return static_cast<std::int32_t>(*flag - value) >= 0; });
}

namespace {

/// float32, in the order of the inner index.
class PlainMultiplier final : public Multiplier {
 public:
  void multiply(const Product& product, int, Stream stream) override {
    cuda_on_cpu::enqueue_step(stream, [=] {
      const auto* const x = static_cast<const float*>(product.x);
      const auto* const weight = static_cast<const float*>(product.weight);
      for (std::int64_t row = 0; row < product.rows; ++row) {
        for (std::int64_t column = 0; column < product.out_features; ++column) {
          float sum = 0;
          for (std::int64_t i = 0; i < product.in_features; ++i) {
            const std::int64_t at =
                product.transposed ? i * product.out_features + column : column * product.in_features + i;
            sum += x[row * product.in_features + i] * weight[at];
          }
          static_cast<float*>(product.out)[row * product.out_features + column] = sum;
        }
      }
      return true;
    });
  }
};

using Message = std::vector<std::byte>;
using Mailboxes = std::map<std::pair<int, int>, std::deque<Message>>;  // (from, to)

class MailboxExchanger final : public Exchanger {
 public:
  MailboxExchanger(int rank, std::shared_ptr<Mailboxes> boxes) : rank_(rank), boxes_(std::move(boxes)) {}

  void exchange(const void* send, std::size_t send_bytes, int peer, void* receive, std::size_t receive_bytes,
                int source, Stream stream) override {
    cuda_on_cpu::enqueue_step(stream, [=, this] {
      if (send_bytes > 0) {
        const auto* const bytes = static_cast<const std::byte*>(send);
        (*boxes_)[{rank_, peer}].emplace_back(bytes, bytes + send_bytes);
      }
      return true;
    });
    if (receive_bytes == 0) return;
    cuda_on_cpu::enqueue_step(stream, [=, this] {
      auto& box = (*boxes_)[{source, rank_}];
      if (box.empty()) return false;
      if (box.front().size() != receive_bytes) throw std::logic_error("a message of another size");
      std::memcpy(receive, box.front().data(), receive_bytes);
      box.pop_front();
      return true;
    });
  }

 private:
  int rank_;
  std::shared_ptr<Mailboxes> boxes_;
};

/// All ranks: in one object, as virtual ranks are, or one each, as processes have them.
struct Ranks {
  std::vector<std::unique_ptr<OverlappedMatmul>> objects;
  std::vector<Stream> callers;
};

}  // namespace

extern "C" {

Ranks* matmul_new(int world_size, int together, int mapped, int num_pieces, int num_lanes,
                  const MatmulCapacity* capacity) {
  auto ranks = std::make_unique<Ranks>();
  std::shared_ptr<SymmetricMemory> memory;
  if (mapped != 0) memory = virtual_rank_memory(0, world_size, matmul_workspace_bytes(*capacity, world_size));
  const auto boxes = std::make_shared<Mailboxes>();
  OverlapOptions options;
  options.plan = {num_pieces, num_lanes, mapped != 0};
  options.reduce_blocks = 2;
  for (int first = 0; first < world_size; first += together != 0 ? world_size : 1) {
    MatmulParts parts{memory, {}, world_size, {}, nullptr};
    for (int rank = first; rank < (together != 0 ? world_size : first + 1); ++rank) {
      parts.local_ranks.push_back(rank);
      parts.multipliers.push_back(std::make_unique<PlainMultiplier>());
    }
    if (mapped == 0) parts.exchanger = std::make_unique<MailboxExchanger>(first, boxes);
    ranks->objects.push_back(make_overlapped_matmul(std::move(parts), *capacity, options));
    ranks->callers.push_back(cuda_on_cpu::make_stream());
  }
  return ranks.release();
}

void matmul_free(Ranks* ranks) {
  ranks->objects.clear();
  for (const Stream caller : ranks->callers) cuda_on_cpu::free_stream(caller);
  delete ranks;
}

/// The call of one object: its ranks' tensors (x, weight, out).
const char* matmul_enqueue(Ranks* ranks, int object, int op, const std::int64_t* rows, int num_rows,
                           std::int64_t in_features, std::int64_t out_features, int transposed, int one_by_one,
                           const MatmulTensors* tensors, int num_tensors) {
  return guarded([&] {
    const MatmulCall call{
        static_cast<MatmulOp>(op), DType::kFloat32, {rows, rows + num_rows}, in_features, out_features,
        transposed != 0,           one_by_one != 0};
    const auto i = static_cast<std::size_t>(object);
    ranks->objects[i]->enqueue(call, {tensors, tensors + num_tensors}, ranks->callers[i]);
  });
}

/// Of an object's first rank.
const void* matmul_gathered(Ranks* ranks, int object) {
  return ranks->objects[static_cast<std::size_t>(object)]->gathered();
}

const char* matmul_wait(Ranks* ranks, int object, double timeout_s) {
  return guarded([&] { ranks->objects[static_cast<std::size_t>(object)]->wait(timeout_s); });
}

std::size_t matmul_run(std::uint32_t seed) {
  cuda_on_cpu::run(seed);
  return cuda_on_cpu::num_queued();
}

}  // extern "C"
