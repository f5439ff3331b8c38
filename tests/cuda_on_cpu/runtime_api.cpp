// Ranks and their memory as the host code for GPUs makes them, as C functions for ctypes (test_runtime.py).
#include <cstring>
#include <memory>

#include "cuda/kernels/all_reduce.hpp"
#include "cuda/runtime/rank_group.hpp"
#include "guarded.hpp"

using namespace pycomm;        // NOLINT: a test program
using namespace pycomm::cuda;  // NOLINT
using cuda_on_cpu::guarded;

namespace {

struct Launched {  // the ranks of one group, and a stream of the one who calls
  std::unique_ptr<RankGroup> ranks;
  Stream caller = cuda_on_cpu::make_stream();
};

}  // namespace

extern "C" {

void set_num_multiprocessors(int num) { cuda_on_cpu::num_multiprocessors = num; }

const char* group_new(int world_size, double timeout_s, Launched** group) {
  return guarded([&] {
    std::vector<int> ranks;
    for (int rank = 0; rank < world_size; ++rank) ranks.push_back(rank);
    auto made = std::make_unique<Launched>();
    made->ranks = make_rank_group(virtual_rank_memory(0, world_size, sizeof(SignalPad)), 0, ranks, timeout_s);
    *group = made.release();
  });
}
void group_free(Launched* group) {
  cuda_on_cpu::free_stream(group->caller);
  delete group;
}

/// float32 sums in place on the first `num_ranks` ranks, between what the caller's stream does before and after.
const char* group_all_reduce(Launched* group, int num_ranks, int num_blocks, std::int64_t count, float* const* data) {
  return guarded([&] {
    group->ranks->fork(group->caller);
    for (int rank = 0; rank < num_ranks; ++rank) {
      TwoShotParams params{group->ranks->group(rank), DType::kFloat32, ReduceOp::kSum, flat_layout(count), {}, {}};
      for (int peer = 0; peer < group->ranks->world_size(); ++peer) params.data[peer] = data[peer];
      launch_all_reduce_two_shot(params, group->ranks->shape(rank, num_blocks, 32));
    }
    group->ranks->join(group->caller);
  });
}
/// On the caller's stream: value to value + 1, seen in order with the kernels.
void group_add_one(Launched* group, float* value) {
  cuda_on_cpu::enqueue_step(group->caller, [=] {
    *value += 1;
    return true;
  });
}
const char* group_wait(Launched* group) {
  return guarded([&] { group->ranks->wait(60); });
}
const char* group_abort(Launched* group) {
  return guarded([&] { group->ranks->abort(); });
}

/// A window of two ranks, `parts` by rank, as the second one takes it; in `kept`: who owns it while it is used, and
/// after.
const char* window(std::byte* const* parts, std::size_t bytes, int* kept) {
  return guarded([&] {
    const auto owner = std::make_shared<int>(0);
    {
      const auto memory = window_memory(0, 1, {parts[0], parts[1]}, bytes, owner);
      if (std::strcmp(memory->provider(), "windows") != 0) throw std::logic_error("another provider");
      kept[0] = static_cast<int>(owner.use_count());
    }
    kept[1] = static_cast<int>(owner.use_count());
  });
}

}  // extern "C"
