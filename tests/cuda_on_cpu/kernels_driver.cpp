// The kernels of virtual ranks under a sanitizer, every CUDA thread an OS thread (threads.cpp). Random sequences of
// kernels are queued on every rank's stream without the host in between, so only the kernels' own signals order what
// they do to memory that they share. Each round has a dtype, a number of elements and an address a tensor of its own;
// tensors end where their memory does. Values are small whole numbers and halves, so results are exact.
//
//   kernels_driver SEED NUM_RANKS NUM_ROUNDS [ORDERING]
//
// ORDERING: the number of the one ordering of signal.cuh to weaken; ThreadSanitizer must report it. Exit status 0: all
// right; 1: a wrong result; 66: a sanitizer's report.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cuda/device/arithmetic.cuh"
#include "cuda/device/signal.cuh"
#include "cuda/kernels/all_gather.hpp"
#include "cuda/kernels/all_reduce.hpp"
#include "cuda/kernels/bucket.hpp"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/put_get.hpp"
#include "cuda/kernels/reduce_scatter.hpp"
#include "cuda/kernels/sharded_adamw.hpp"
#include "world.hpp"

namespace {

using namespace pycomm;        // NOLINT: a test program
using namespace pycomm::cuda;  // NOLINT
using cuda_on_cpu::World;

constexpr std::uint64_t kLongNs = 300'000'000'000;
constexpr int kBlocks = 2;
constexpr int kThreads = 32;

void expect(double got, double wanted, const char* what) {
  if (got == wanted) return;
  std::fprintf(stderr, "%s: %g instead of %g\n", what, got, wanted);
  std::exit(1);
}

/// Elements of a dtype, `shift` of them behind a 16-byte boundary; their memory ends with the last one.
class Tensor {
 public:
  Tensor(DType dtype, std::int64_t count, std::int64_t shift, double value)
      : dtype_(dtype),
        count_(count),
        shift_(shift),
        memory_(new std::byte[static_cast<std::size_t>(count + shift) * size_of(dtype)]) {
    dispatch("tensor", dtype, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      std::fill_n(static_cast<T*>(at(0)), count, rounded<T>(static_cast<Accumulator<T>>(value)));
    });
  }
  void* at(std::int64_t element) const {
    return memory_.get() + static_cast<std::size_t>(shift_ + element) * size_of(dtype_);
  }
  std::byte* bytes(std::int64_t element) const { return static_cast<std::byte*>(at(element)); }
  void expect_all(double wanted) const {
    dispatch("tensor", dtype_, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      const auto* const values = static_cast<const T*>(at(0));
      for (std::int64_t i = 0; i < count_; ++i) expect(static_cast<double>(widened(values[i])), wanted, "tensor");
    });
  }

 private:
  DType dtype_;
  std::int64_t count_, shift_;
  std::unique_ptr<std::byte[]> memory_;
};

/// One round: what a test queues on all ranks, and what must then be there.
class Round {
 public:
  Round(int num_ranks, unsigned seed)
      : n_(num_ranks),
        draw_(seed),
        world_(num_ranks, kLongNs),
        dtype_(one_of(DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64, DType::kInt8, DType::kUInt8,
                      DType::kInt32, DType::kInt64)),
        count_(one_of(1, 13, 1027, 2 * kChunkElements + 13)) {
    const bool is_aligned = draw_() % 2 == 0;
    for (int rank = 0; rank < n_; ++rank) {
      const auto made = [&](DType dtype, std::int64_t count, double value) {
        return Tensor(dtype, count, is_aligned ? 0 : static_cast<std::int64_t>(draw_() % 8), value);
      };
      tensors_.push_back(made(dtype_, count_, 1));
      received_.push_back(made(dtype_, count_, 0));
      slots_.push_back(made(dtype_, count_, 0));
      staging_.emplace_back(kStagingBytes);
      squares_.emplace_back(static_cast<std::size_t>(flat_layout(count_).num_chunks));
    }
  }

  void run() {
    double value = 1;  // of every element of every rank's tensor
    for (int k = 0; k < 5; ++k) {
      // Sums that all dtypes can hold.
      const ReduceOp op = value * n_ <= 100 ? ReduceOp::kSum : one_of(ReduceOp::kMin, ReduceOp::kMax);
      const unsigned kind = draw_() % (has_adamw() ? 5 : 4);
      for (int rank = 0; rank < n_; ++rank) {
        if (kind == 0) one_shot(rank, op);
        if (kind == 1) two_shot(rank, op);
        if (kind == 2) reduce_scatter_and_gather(rank, op);
        if (kind == 3) ring(rank);
        if (kind == 4) adamw(rank, value);
      }
      if (kind <= 2 && op == ReduceOp::kSum) value *= n_;
      if (kind == 4) value *= 0.5;  // decay; the gradients are zero
    }
    cuda_on_cpu::run(0);
    for (int rank = 0; rank < n_; ++rank) {
      expect(world_.status(rank).code, 0, "status");
      tensors_[at(rank)].expect_all(value);
    }
  }

 private:
  static constexpr std::size_t kStagingBytes = 2 * kOneShotBlocks * 16384;
  static std::size_t at(int rank) { return static_cast<std::size_t>(rank); }
  template <class First, class... Rest>
  First one_of(First first, Rest... rest) {
    const First all[] = {first, rest...};
    return all[draw_() % (1 + sizeof...(rest))];
  }
  bool has_adamw() const { return is_floating_point(dtype_) && dtype_ != DType::kFloat64; }
  LaunchShape shape(int rank) const { return world_.shape(rank, kBlocks, kThreads); }
  struct Share {
    std::int64_t begin, end;
  };
  Share share(int rank) const {
    const std::int64_t chunks = (count_ + kChunkElements - 1) / kChunkElements;
    const auto cut = [&](int r) { return std::min(chunks * r / n_ * kChunkElements, count_); };
    return {cut(rank), rank + 1 == n_ ? count_ : cut(rank + 1)};
  }
  void one_shot(int rank, ReduceOp op) {
    void* const own = tensors_[at(rank)].at(0);
    OneShotParams params{world_.group(rank), dtype_, dtype_, op, flat_layout(count_), own, own, {},
                         kStagingBytes,      nullptr};
    for (int peer = 0; peer < n_; ++peer) params.staging[peer] = staging_[at(peer)].data();
    launch_all_reduce_one_shot(params, shape(rank));
  }
  void two_shot(int rank, ReduceOp op) {
    TwoShotParams params{world_.group(rank), dtype_, op, flat_layout(count_), {}, {}};
    for (int peer = 0; peer < n_; ++peer) {
      params.data[peer] = tensors_[at(peer)].at(0);
      params.squares[peer] = squares_[at(peer)].data();
    }
    launch_all_reduce_two_shot(params, shape(rank));
  }
  /// In place, then the parts back to everyone.
  void reduce_scatter_and_gather(int rank, ReduceOp op) {
    const Share own = share(rank);
    const std::int64_t count = own.end - own.begin;
    std::byte* const output = tensors_[at(rank)].bytes(own.begin);
    ReduceScatterParams scatter{world_.group(rank), dtype_, dtype_, op, flat_layout(count), {}, output, {}};
    AllGatherParams gather{world_.group(rank), output, count * static_cast<std::int64_t>(size_of(dtype_)), {}};
    for (int peer = 0; peer < n_; ++peer) {
      scatter.input[peer] = gather.output[peer] = tensors_[at(peer)].bytes(own.begin);
    }
    launch_reduce_scatter(scatter, shape(rank));
    launch_all_gather(gather, shape(rank));
  }
  /// To the right through one slot, twice, so that it is used again; the tensor comes back as it was.
  void ring(int rank) {
    const int right = (rank + 1) % n_;
    const int left = (rank + n_ - 1) % n_;
    const std::int64_t bytes = count_ * static_cast<std::int64_t>(size_of(dtype_));
    PutParams put{{world_.group(rank), right, 1, bytes}, tensors_[at(rank)].bytes(0), {slots_[at(right)].bytes(0)}};
    GetParams get{{world_.group(rank), left, 1, bytes}, {slots_[at(rank)].bytes(0)}, received_[at(rank)].bytes(0)};
    for (int k = 0; k < 2; ++k) {
      launch_put(put, shape(rank));
      launch_get(get, shape(rank));
      put.input = get.output;
      get.output = tensors_[at(rank)].bytes(0);
    }
  }
  void adamw(int rank, double value) {
    const Share own = share(rank);
    const std::int64_t count = own.end - own.begin;
    const auto state = [&](double of) {
      return static_cast<float*>(states_.emplace_back(DType::kFloat32, count, rank % 3, of).at(0));
    };
    ShardedAdamWParams params{};
    params.group = world_.group(rank);
    params.grad_dtype = params.param_dtype = dtype_;
    params.layout = flat_layout(count);
    params.num_grads = n_;
    params.master = state(value);
    params.exp_avg = state(0);
    params.exp_avg_sq = state(0);
    params.factors = adamw_factors({0.5, 0.5, 0.5, 1.0, 1.0}, 1);
    const Tensor& zeros = states_.emplace_back(dtype_, count, rank % 5, 0);
    for (int peer = 0; peer < n_; ++peer) {
      params.grads[peer] = zeros.at(0);
      params.params[peer] = tensors_[at(peer)].at(own.begin);
    }
    launch_sharded_adamw(params, shape(rank));
  }

  int n_;
  std::minstd_rand draw_;
  World world_;
  DType dtype_;
  std::int64_t count_;
  std::vector<Tensor> tensors_, slots_, received_;
  std::deque<Tensor> states_;
  std::vector<std::vector<std::byte>> staging_;
  std::vector<std::vector<double>> squares_;
};

std::vector<float> filled(std::size_t count, float value) { return std::vector<float>(count, value); }

/// Gather with squares, their norm, scatter: shuffles and shared memory.
void bucket_round(unsigned seed) {
  World world(1, kLongNs);
  std::vector<float> first = filled(1030, 2);
  std::vector<float> second = filled(7 + seed % 9, 2);
  std::vector<float> flat(first.size() + second.size());
  const Segment segments[] = {
      {0, static_cast<std::int64_t>(first.size()), 0, first.data()},
      {static_cast<std::int64_t>(first.size()), static_cast<std::int64_t>(second.size()), 2, second.data()}};
  std::vector<double> squares(3);
  std::uint32_t non_finite = 0;
  ClipResult clip{};
  BucketParams params{DType::kFloat32, DType::kFloat32, {segments, 2, kChunkElements, 3, 0}, flat.data(), 0.5F, false,
                      squares.data(),  &non_finite};
  const LaunchShape shape = world.shape(0, kBlocks, 64);
  launch_bucket_gather(params, shape);
  launch_norm({squares.data(), 3, 1e9F, &clip}, shape.stream);
  launch_bucket_scatter(params, shape);
  cuda_on_cpu::run(0);
  expect(clip.norm, static_cast<float>(std::sqrt(static_cast<double>(flat.size()))), "norm");
  expect(non_finite, 0, "non_finite");
  for (const float value : first) expect(value, 0.5, "scattered");
}

/// The last rank never comes; the host watches a status word meanwhile. The clock is the machine's, so the others may
/// be late, too: who must be named, fibers show (test_messages_and_faults.py).
void dead_rank_round(int num_ranks) {
  World world(num_ranks, 20'000'000);
  constexpr std::int64_t kCount = kChunkElements + 13;
  std::vector<float> tensor = filled(kCount, 1);
  for (int rank = 0; rank + 1 < num_ranks; ++rank) {
    TwoShotParams params{world.group(rank), DType::kFloat32, ReduceOp::kSum, flat_layout(kCount), {}, {}};
    for (int peer = 0; peer < num_ranks; ++peer) params.data[peer] = tensor.data();
    launch_all_reduce_two_shot(params, world.shape(rank, kBlocks, kThreads));
  }
  bool is_named = false;
  std::thread watcher([&] {
    Status& status = world.status(0);
    while (std::atomic_ref(status.code).load(std::memory_order_acquire) == 0) std::this_thread::yield();
    is_named = status.code == static_cast<std::uint32_t>(StatusCode::kExpired) ? status.rank > 0 : status.rank >= 0;
  });
  cuda_on_cpu::run(0);
  watcher.join();
  expect(is_named, true, "another rank is named");
  for (int rank = 0; rank + 1 < num_ranks; ++rank) expect(world.status(rank).code != 0, true, "gives up");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: kernels_driver SEED NUM_RANKS NUM_ROUNDS [ORDERING]\n");
    return 2;
  }
  const auto seed = static_cast<unsigned>(std::atoi(argv[1]));
  const int num_ranks = std::atoi(argv[2]);
  const int num_rounds = std::atoi(argv[3]);
  const int weakened = argc > 4 ? std::atoi(argv[4]) : -1;
  cuda_on_cpu::weaken(weakened);
  // Where a block's threads do not meet around a wait, some leave after an abort and others wait for them for ever.
  const bool with_dead_rank = num_ranks > 1 && weakened != static_cast<int>(Ordering::kBarrierEnter) &&
                              weakened != static_cast<int>(Ordering::kBarrierLeave);
  for (int round = 0; round < num_rounds; ++round) {
    if (with_dead_rank) dead_rank_round(num_ranks);
    Round(num_ranks, seed + static_cast<unsigned>(round)).run();
    bucket_round(seed);
  }
  std::printf("%d rounds on %d ranks right\n", num_rounds, num_ranks);
  return 0;
}
