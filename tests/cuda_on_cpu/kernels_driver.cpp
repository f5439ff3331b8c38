// The kernels of virtual ranks under a sanitizer, every CUDA thread an OS thread (threads.cpp). Random sequences of
// kernels are queued on every rank's stream without the host in between, so only the kernels' own signals order what
// they do to memory that they share; values are whole numbers, so results are exact.
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
#include <random>
#include <thread>
#include <vector>

#include "cuda/device/signal.cuh"
#include "cuda/kernels/all_gather.hpp"
#include "cuda/kernels/all_reduce.hpp"
#include "cuda/kernels/bucket.hpp"
#include "cuda/kernels/put_get.hpp"
#include "cuda/kernels/reduce_scatter.hpp"
#include "cuda/kernels/sharded_adamw.hpp"
#include "world.hpp"

namespace {

using namespace pycomm;        // NOLINT: a test program
using namespace pycomm::cuda;  // NOLINT
using cuda_on_cpu::World;

constexpr std::uint64_t kLongNs = 300'000'000'000;
constexpr std::int64_t kCount = 2 * kChunkElements + 13;
constexpr int kBlocks = 2;
constexpr int kThreads = 32;

void expect(double got, double wanted, const char* what) {
  if (got == wanted) return;
  std::fprintf(stderr, "%s: %g instead of %g\n", what, got, wanted);
  std::exit(1);
}

std::vector<float> filled(std::size_t count, float value) { return std::vector<float>(count, value); }

/// One round: what a test queues on all ranks, and what must then be there.
class Round {
 public:
  Round(int num_ranks, unsigned seed) : n_(num_ranks), draw_(seed), world_(num_ranks, kLongNs) {
    for (int rank = 0; rank < n_; ++rank) {
      tensors_.push_back(filled(kCount, 1));
      staging_.emplace_back(kStagingBytes);
      squares_.emplace_back(kCount / kChunkElements + 1);
      slots_.push_back(filled(2 * kCount, 0));
      received_.push_back(filled(kCount, 0));
      moments_.push_back(filled(2 * kCount, 0));
    }
  }

  void run() {
    double value = 1;  // of every element of every rank's tensor
    for (int k = 0; k < 5; ++k) {
      switch (draw_() % 5) {
        case 0:
          for (int rank = 0; rank < n_; ++rank) one_shot(rank);
          value *= n_;
          break;
        case 1:
          for (int rank = 0; rank < n_; ++rank) two_shot(rank);
          value *= n_;
          break;
        case 2:  // in place, then the parts back to everyone
          for (int rank = 0; rank < n_; ++rank) reduce_scatter_and_gather(rank);
          value *= n_;
          break;
        case 3:
          for (int rank = 0; rank < n_; ++rank) ring(rank);
          break;
        default:
          for (int rank = 0; rank < n_; ++rank) adamw(rank);
          value = value * 0.5;  // decay; the gradients are zero
      }
    }
    cuda_on_cpu::run(0);
    for (int rank = 0; rank < n_; ++rank) {
      expect(world_.status(rank).code, 0, "status");
      for (const float got : tensors_[at(rank)]) expect(got, value, "tensor");
    }
  }

 private:
  static constexpr std::size_t kStagingBytes = 2 * kOneShotBlocks * 8192;
  static std::size_t at(int rank) { return static_cast<std::size_t>(rank); }
  LaunchShape shape(int rank) const { return world_.shape(rank, kBlocks, kThreads); }
  struct Share {
    std::int64_t begin, end;
  };
  Share share(int rank) const {
    const std::int64_t chunks = (kCount + kChunkElements - 1) / kChunkElements;
    const auto cut = [&](int r) { return std::min(chunks * r / n_ * kChunkElements, kCount); };
    return {cut(rank), cut(rank + 1)};
  }
  void one_shot(int rank) {
    float* const own = tensors_[at(rank)].data();
    OneShotParams params{
        world_.group(rank), DType::kFloat32, DType::kFloat32, ReduceOp::kSum, flat_layout(kCount), own, own, {},
        kStagingBytes,      nullptr};
    for (int peer = 0; peer < n_; ++peer) params.staging[peer] = staging_[at(peer)].data();
    launch_all_reduce_one_shot(params, shape(rank));
  }
  void two_shot(int rank) {
    TwoShotParams params{world_.group(rank), DType::kFloat32, ReduceOp::kSum, flat_layout(kCount), {}, {}};
    for (int peer = 0; peer < n_; ++peer) {
      params.data[peer] = tensors_[at(peer)].data();
      params.squares[peer] = squares_[at(peer)].data();
    }
    launch_all_reduce_two_shot(params, shape(rank));
  }
  void reduce_scatter_and_gather(int rank) {
    const Share own = share(rank);
    ReduceScatterParams scatter{world_.group(rank),
                                DType::kFloat32,
                                DType::kFloat32,
                                ReduceOp::kSum,
                                flat_layout(own.end - own.begin),
                                {},
                                tensors_[at(rank)].data() + own.begin,
                                {}};
    AllGatherParams gather{
        world_.group(rank), reinterpret_cast<const std::byte*>(scatter.output), (own.end - own.begin) * 4, {}};
    for (int peer = 0; peer < n_; ++peer) {
      scatter.input[peer] = tensors_[at(peer)].data() + own.begin;
      gather.output[peer] = reinterpret_cast<std::byte*>(tensors_[at(peer)].data() + own.begin);
    }
    launch_reduce_scatter(scatter, shape(rank));
    launch_all_gather(gather, shape(rank));
  }
  /// To the right through one or two slots, twice, so that a slot is used again; the tensor comes back as it was.
  void ring(int rank) {
    const int right = (rank + 1) % n_;
    const int left = (rank + n_ - 1) % n_;
    const std::int64_t bytes = kCount * 4;
    const auto slot = [&](int of) { return reinterpret_cast<std::byte*>(slots_[at(of)].data()); };
    PutParams put{{world_.group(rank), right, 1, bytes}, nullptr, {slot(right)}};
    put.input = reinterpret_cast<const std::byte*>(tensors_[at(rank)].data());
    GetParams get{{world_.group(rank), left, 1, bytes}, {slot(rank)}, nullptr};
    get.output = reinterpret_cast<std::byte*>(received_[at(rank)].data());
    for (int k = 0; k < 2; ++k) {
      launch_put(put, shape(rank));
      launch_get(get, shape(rank));
      put.input = get.output;
      get.output = reinterpret_cast<std::byte*>(tensors_[at(rank)].data());
    }
  }
  void adamw(int rank) {
    const Share own = share(rank);
    ShardedAdamWParams params{};
    params.group = world_.group(rank);
    params.grad_dtype = params.param_dtype = DType::kFloat32;
    params.layout = flat_layout(own.end - own.begin);
    params.num_grads = n_;
    params.exp_avg = moments_[at(rank)].data();
    params.exp_avg_sq = moments_[at(rank)].data() + kCount;
    params.factors = adamw_factors({0.5, 0.5, 0.5, 1.0, 1.0}, 1);
    for (int peer = 0; peer < n_; ++peer) {
      params.grads[peer] = zeros_.data();
      params.params[peer] = tensors_[at(peer)].data() + own.begin;
    }
    launch_sharded_adamw(params, shape(rank));
  }

  int n_;
  std::minstd_rand draw_;
  World world_;
  std::vector<std::vector<float>> tensors_, slots_, received_, moments_;
  std::vector<std::vector<std::byte>> staging_;
  std::vector<std::vector<double>> squares_;
  const std::vector<float> zeros_ = filled(kCount, 0);
};

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

/// The last rank never comes; the host watches the status words meanwhile.
void dead_rank_round(int num_ranks) {
  World world(num_ranks, 20'000'000);
  std::vector<float> tensor = filled(kCount, 1);
  for (int rank = 0; rank + 1 < num_ranks; ++rank) {
    TwoShotParams params{world.group(rank), DType::kFloat32, ReduceOp::kSum, flat_layout(kCount), {}, {}};
    for (int peer = 0; peer < num_ranks; ++peer) params.data[peer] = tensor.data();
    launch_all_reduce_two_shot(params, world.shape(rank, kBlocks, kThreads));
  }
  int missing = -1;
  std::thread watcher([&] {
    Status& status = world.status(0);
    while (std::atomic_ref(status.code).load(std::memory_order_acquire) == 0) std::this_thread::yield();
    missing = status.code == static_cast<std::uint32_t>(StatusCode::kExpired) ? status.rank : num_ranks - 1;
  });
  cuda_on_cpu::run(0);
  watcher.join();
  expect(missing, num_ranks - 1, "missing rank");
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
  // Where a block's threads do not meet after a wait, some leave after a timeout and others wait for them for ever.
  const bool with_dead_rank = num_ranks > 1 && weakened != static_cast<int>(Ordering::kLeave);
  for (int round = 0; round < num_rounds; ++round) {
    if (with_dead_rank) dead_rank_round(num_ranks);
    Round(num_ranks, seed + static_cast<unsigned>(round)).run();
    bucket_round(seed);
  }
  std::printf("%d rounds on %d ranks right\n", num_rounds, num_ranks);
  return 0;
}
