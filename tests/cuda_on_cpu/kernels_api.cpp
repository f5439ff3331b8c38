// The launchers as C functions for ctypes (tests/cuda_on_cpu/kernels.py). Each returns null or what went wrong.
#include <algorithm>

#include "cuda/device/convert.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/kernels/all_gather.hpp"
#include "cuda/kernels/all_reduce.hpp"
#include "cuda/kernels/bucket.hpp"
#include "cuda/kernels/put_get.hpp"
#include "cuda/kernels/reduce_scatter.hpp"
#include "cuda/kernels/sharded_adamw.hpp"
#include "guarded.hpp"
#include "world.hpp"

using namespace pycomm;        // NOLINT: a test program
using namespace pycomm::cuda;  // NOLINT
using cuda_on_cpu::guarded;
using cuda_on_cpu::World;

namespace {

template <class Pointer>
void copy_pointers(const World* world, Pointer const* from, Pointer (&to)[kMaxRanks]) {
  if (from != nullptr) std::copy_n(from, world->group(0).world_size, to);
}

}  // namespace

extern "C" {

struct Where {  // a rank's kernel
  World* world;
  int rank, num_blocks, num_threads;
  LaunchShape shape() const { return world->shape(rank, num_blocks, num_threads); }
};

World* world_new(int num_ranks, std::uint64_t timeout_ns) { return new World(num_ranks, timeout_ns); }
void world_free(World* world) { delete world; }
void world_run(std::uint32_t seed) { cuda_on_cpu::run(seed); }
const Status* world_status(World* world, int rank) { return &world->status(rank); }
void world_abort(World* world, int rank) { world->pad(rank).abort = 1; }
/// As if so many barriers and messages had been before.
void world_start_at(World* world, std::uint32_t epoch) {
  for (int rank = 0; rank < world->group(0).world_size; ++rank) {
    SignalPad& pad = world->pad(rank);
    std::fill_n(&pad.barrier[0][0], sizeof pad.barrier / sizeof epoch, epoch);
    std::fill_n(&pad.posted[0][0], sizeof pad.posted / sizeof epoch, epoch);
    std::fill_n(&pad.taken[0][0], sizeof pad.taken / sizeof epoch, epoch);
    std::fill_n(&pad.epoch[0], sizeof pad.epoch / sizeof epoch, epoch);
    std::fill_n(&pad.num_put[0][0], sizeof pad.num_put / sizeof epoch, epoch);
    std::fill_n(&pad.num_taken[0][0], sizeof pad.num_taken / sizeof epoch, epoch);
  }
}

void bounds_of_part(std::int64_t count, std::int64_t unit, int index, int num, std::int64_t* bounds) {
  const Part part = part_of(count, unit, index, num);
  bounds[0] = part.begin;
  bounds[1] = part.end;
}

/// A group that has lost something: its last rank's pad, or the status word.
const char* broken_group(const Where* where, int without_status) {
  return guarded([&] {
    AllGatherParams params{where->world->group(where->rank), nullptr, 0, {}};
    if (without_status != 0) {
      params.group.status = nullptr;
    } else {
      params.group.pads[params.group.world_size - 1] = nullptr;
    }
    launch_all_gather(params, where->shape());
  });
}

std::size_t staging_bytes(const Where* where, const Layout* layout, int wire) {
  return one_shot_staging_bytes(*layout, static_cast<DType>(wire), where->shape());
}

const char* all_reduce_one_shot(const Where* where, const Layout* layout, int dtype, int wire, int op,
                                const void* input, void* output, std::byte* const* staging, std::size_t bytes,
                                double* squares) {
  return guarded([&] {
    OneShotParams params{where->world->group(where->rank),
                         static_cast<DType>(dtype),
                         static_cast<DType>(wire),
                         static_cast<ReduceOp>(op),
                         *layout,
                         input,
                         output,
                         {},
                         bytes,
                         squares};
    copy_pointers(where->world, staging, params.staging);
    launch_all_reduce_one_shot(params, where->shape());
  });
}

const char* all_reduce_two_shot(const Where* where, const Layout* layout, int dtype, int op, void* const* data,
                                double* const* squares) {
  return guarded([&] {
    TwoShotParams params{
        where->world->group(where->rank), static_cast<DType>(dtype), static_cast<ReduceOp>(op), *layout, {}, {}};
    copy_pointers(where->world, data, params.data);
    copy_pointers(where->world, squares, params.squares);
    launch_all_reduce_two_shot(params, where->shape());
  });
}

const char* reduce_scatter(const Where* where, const Layout* layout, int dtype, int output_dtype, int op,
                           const void* const* input, void* output, double* const* squares) {
  return guarded([&] {
    ReduceScatterParams params{where->world->group(where->rank),
                               static_cast<DType>(dtype),
                               static_cast<DType>(output_dtype),
                               static_cast<ReduceOp>(op),
                               *layout,
                               {},
                               output,
                               {}};
    copy_pointers(where->world, input, params.input);
    copy_pointers(where->world, squares, params.squares);
    launch_reduce_scatter(params, where->shape());
  });
}

const char* all_gather(const Where* where, const std::byte* input, std::int64_t bytes, std::byte* const* output) {
  return guarded([&] {
    AllGatherParams params{where->world->group(where->rank), input, bytes, {}};
    copy_pointers(where->world, output, params.output);
    launch_all_gather(params, where->shape());
  });
}

const char* put(const Where* where, int peer, int num_slots, std::int64_t bytes, const std::byte* input,
                std::byte* const* slots) {
  return guarded([&] {
    PutParams params{{where->world->group(where->rank), peer, num_slots, bytes}, input, {}};
    std::copy_n(slots, std::min(num_slots, kMaxSlots), params.slots);
    launch_put(params, where->shape());
  });
}

const char* get(const Where* where, int peer, int num_slots, std::int64_t bytes, const std::byte* const* slots,
                std::byte* output) {
  return guarded([&] {
    GetParams params{{where->world->group(where->rank), peer, num_slots, bytes}, {}, output};
    std::copy_n(slots, std::min(num_slots, kMaxSlots), params.slots);
    launch_get(params, where->shape());
  });
}

const char* bucket(const Where* where, int gather, const Layout* layout, int tensor_dtype, int bucket_dtype,
                   void* memory, float scale, int accumulate, double* squares, std::uint32_t* non_finite) {
  return guarded([&] {
    const BucketParams params{static_cast<DType>(tensor_dtype),
                              static_cast<DType>(bucket_dtype),
                              *layout,
                              memory,
                              scale,
                              accumulate != 0,
                              squares,
                              non_finite};
    (gather != 0 ? launch_bucket_gather : launch_bucket_scatter)(params, where->shape());
  });
}

const char* norm(const Where* where, const double* squares, std::int64_t num_squares, float max_norm,
                 ClipResult* result) {
  return guarded([&] { launch_norm({squares, num_squares, max_norm, result}, where->shape().stream); });
}

const char* sharded_adamw(const Where* where, std::int64_t num_elements, int grad_dtype, int param_dtype,
                          const void* const* grads, int num_grads, int average, float* const* state,
                          void* const* parameters, const AdamWOptions* options, std::int64_t step,
                          const ClipResult* clip) {
  return guarded([&] {
    ShardedAdamWParams params{where->world->group(where->rank),
                              static_cast<DType>(grad_dtype),
                              static_cast<DType>(param_dtype),
                              flat_layout(num_elements),
                              {},
                              num_grads,
                              average != 0,
                              state[0],
                              state[1],
                              state[2],
                              {},
                              adamw_factors(*options, step),
                              clip};
    std::copy_n(grads, num_grads, params.grads);
    copy_pointers(where->world, parameters, params.params);
    launch_sharded_adamw(params, where->shape());
  });
}

/// Each of `count` floats to 16 or 8 bits and back. formats: 0 float16, 1 bfloat16, 2 e4m3, 3 e5m2.
void convert(int format, const float* values, std::int64_t count, std::uint16_t* codes) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (format == 0) codes[i] = from_float<Float16>(values[i]).bits;
    if (format == 1) codes[i] = from_float<BFloat16>(values[i]).bits;
    if (format == 2) codes[i] = from_float<Float8E4M3>(values[i]).bits;
    if (format == 3) codes[i] = from_float<Float8E5M2>(values[i]).bits;
  }
}
void convert_back(int format, const std::uint16_t* codes, std::int64_t count, float* values) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto code8 = static_cast<std::uint8_t>(codes[i]);
    if (format == 0) values[i] = to_float(Float16{codes[i]});
    if (format == 1) values[i] = to_float(BFloat16{codes[i]});
    if (format == 2) values[i] = to_float(Float8E4M3{code8});
    if (format == 3) values[i] = to_float(Float8E5M2{code8});
  }
}

}  // extern "C"
