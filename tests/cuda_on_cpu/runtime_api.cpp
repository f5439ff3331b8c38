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

// A stand-in for NCCL's windows: every rank's memory is known to all.
std::byte* window_memory[kMaxRanks];
int window_rank = 0;
int num_windows = 0;

int mem_alloc(void** memory, std::size_t bytes) {
  *memory = std::malloc(bytes);
  std::memset(*memory, 0x5A, bytes);
  return 0;
}
int mem_free(void* memory) {
  std::free(memory);
  return 0;
}
int window_register(void* communicator, void* memory, std::size_t, void** window, int flags) {
  if (communicator == nullptr || flags != 1) return 4;
  window_memory[window_rank] = static_cast<std::byte*>(memory);
  *window = &window_memory[window_rank];
  ++num_windows;
  return 0;
}
int window_deregister(void*, void*) {
  --num_windows;
  return 0;
}
int peer_pointer(void*, std::size_t offset, int rank, void** address) {
  *address = window_memory[rank] == nullptr ? nullptr : window_memory[rank] + offset;
  return 0;
}
const char* error_string(int) { return "invalid argument"; }

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

/// NCCL windows of the second of two ranks, whose peer's memory is `peer`. Returns in `first` the first byte of each.
const char* windows(std::byte* peer, int has_pointers, unsigned char* first, int* num_left) {
  window_memory[0] = peer;
  window_rank = 1;
  NcclWindows nccl{&window_rank,    mem_alloc,         mem_free,
                   window_register, window_deregister, has_pointers != 0 ? peer_pointer : nullptr,
                   error_string};
  const char* const message = guarded([&] {
    bool met = false;
    const auto memory = nccl_window_memory(0, 2, 1, 64, nccl, [&] { met = true; });
    if (!met || std::strcmp(memory->provider(), "windows") != 0) throw std::logic_error("no barrier");
    for (int rank = 0; rank < 2; ++rank) first[rank] = static_cast<unsigned char>(*memory->part(rank));
  });
  *num_left = num_windows;
  return message;
}

}  // extern "C"
