// Averaged gradients and the optimizer step, block by block: a block of 1,024 elements stays in the L1 cache from its
// reduction to its last use, so the norm, the update and the conversion cost no pass of their own. n ranks, S bytes.
//
// reduce_gradients. Rank r owns the same runs of the bucket on every rank. Steps: 2.
//   to all: push two-shot, like all_reduce. Touched a rank: 2S.
//   to the owner: rank r reads its runs from every bucket. Touched a rank: S + S/n.
// update_everywhere. Every rank updates its runs and writes them to every rank. Steps: 2. Touched a rank, with fp32
//   states: 7S/n (parameter, gradient and two states read, three written) and S(n-1)/n. With the reduction in it,
//   another S.
//
// Ordering. Entry: every rank has its gradients in place, and is done with the old parameters, since it called. Only
// rank r touches its runs of anyone's bucket and of anyone's parameters between the entry and phase 1, which everyone
// waits for before returning.
#include "host/gradient_step.hpp"

#include <algorithm>
#include <array>

#include "host/reduce.hpp"

namespace pycomm::host {

namespace {

struct Scratch {  // of one block
  alignas(64) std::byte raw[kNormBlock * sizeof(double)];
  alignas(64) float wide[kNormBlock];
};

std::byte* at(void* base, std::size_t element, DType dtype) {
  return static_cast<std::byte*>(base) + element * size_of(dtype);
}
const std::byte* at(const void* base, std::size_t element, DType dtype) {
  return static_cast<const std::byte*>(base) + element * size_of(dtype);
}

bool is_half(DType dtype) { return size_of(dtype) == 2; }

/// Calls body(run, first element of the block in it, elements).
template <class Body>
void for_each_block(const std::vector<Run>& runs, const Body& body) {
  for (const Run& run : runs) {
    for (std::size_t begin = 0; begin < run.count; begin += kNormBlock) {
      body(run, begin, std::min<std::size_t>(kNormBlock, run.count - begin));
    }
  }
}

double squared_norm(const StepKernels& kernels, const void* values, DType dtype, std::size_t count, Scratch& scratch) {
  if (dtype == DType::kFloat64) return kernels.squared_norm_double(static_cast<const double*>(values), count);
  if (is_half(dtype)) {
    kernels.widen(dtype, values, scratch.wide, count);
    values = scratch.wide;
  }
  return kernels.squared_norm_float(static_cast<const float*>(values), count);
}

/// Every rank's symmetric buffer.
struct Everyone {
  std::size_t world_size;
  std::array<std::byte*, kMaxRanks> bases;
  std::array<void*, kMaxRanks> place(std::size_t offset) const {
    std::array<void*, kMaxRanks> places;
    for (std::size_t r = 0; r < world_size; ++r) places[r] = bases[r] + offset;
    return places;
  }
};

/// Those that the running call was entered with, as `of` says: its inputs or its outputs.
Everyone everyone(const Group& group, std::byte* (Group::*of)(int) const) {
  Everyone found{static_cast<std::size_t>(group.world_size()), {}};
  for (std::size_t r = 0; r < found.world_size; ++r) found.bases[r] = (group.*of)(static_cast<int>(r));
  return found;
}

/// shard = average, or shard + average, of one block; returns where it is.
void* store_in_shard(const GradientReduction& reduction, bool accumulate, std::size_t packed, std::size_t count,
                     const StepKernels& kernels, Scratch& scratch) {
  void* const target = at(reduction.shard, packed, reduction.shard_dtype);
  const void* average = scratch.raw;
  if (reduction.shard_dtype != reduction.dtype) {  // sent in 16 bits, kept in fp32
    kernels.widen(reduction.dtype, scratch.raw, scratch.wide, count);
    average = scratch.wide;
  }
  if (accumulate) {
    const void* const both[] = {target, average};
    reduce_kernel(reduction.shard_dtype, ReduceOp::kSum)(both, 2, &target, 1, count);
  } else {
    std::memcpy(target, average, count * size_of(reduction.shard_dtype));
  }
  return target;
}

/// AdamW on one block.
void update_block(const ParameterUpdate& update, const Run& run, std::size_t begin, std::size_t count,
                  const AdamWScalars& scalars, const StepKernels& kernels, Scratch& scratch) {
  const std::size_t packed = run.packed + begin;
  const void* grad = at(update.grads, (update.grads_packed ? run.packed : run.grad) + begin, update.grad_dtype);
  if (is_half(update.grad_dtype)) {
    kernels.widen(update.grad_dtype, grad, scratch.wide, count);
    grad = scratch.wide;
  }
  std::byte* const param = at(update.params, run.param + begin, update.param_dtype);
  float* const master = update.master != nullptr ? update.master + packed : reinterpret_cast<float*>(param);
  kernels.adamw(master, static_cast<const float*>(grad), update.exp_avg + packed, update.exp_avg_sq + packed, count,
                scalars);
  if (update.master != nullptr) kernels.narrow(update.param_dtype, master, param, count);
}

}  // namespace

void reduce_gradients(Group& group, const GradientReduction& reduction, bool accumulate) {
  const Location location = group.segments().locate(reduction.grads, reduction.count * size_of(reduction.dtype));
  const Entry entry(group,
                    Call{.kind = OpKind::kReduceGradients,
                         .dtype = reduction.dtype,
                         .root = reduction.to_all ? -1 : 0,
                         .count = reduction.count},
                    {location, location}, [] {});
  const Everyone buckets = everyone(group, &Group::symmetric_input);
  const StepKernels& kernels = step_kernels();
  const ReduceKernel average = reduce_kernel(reduction.dtype, ReduceOp::kAvg);
  const DType dtype = reduction.shard == nullptr ? reduction.dtype : reduction.shard_dtype;
  Scratch scratch;
  for_each_block(*reduction.runs, [&](const Run& run, std::size_t begin, std::size_t count) {
    const auto places = buckets.place((run.grad + begin) * size_of(reduction.dtype));
    void* own = reduction.shard == nullptr ? places[static_cast<std::size_t>(group.rank())] : scratch.raw;
    average(places.data(), group.world_size(), reduction.to_all ? places.data() : &own,
            reduction.to_all ? group.world_size() : 1, count);
    if (reduction.shard != nullptr) {
      own = store_in_shard(reduction, accumulate, run.packed + begin, count, kernels, scratch);
    }
    reduction.norms[run.first_block + begin / kNormBlock] = squared_norm(kernels, own, dtype, count, scratch);
  });
  group.signal(1);
  group.wait(1);
}

void block_norms(const void* values, DType dtype, const std::vector<Run>& runs, double* norms) {
  const StepKernels& kernels = step_kernels();
  Scratch scratch;
  for_each_block(runs, [&](const Run& run, std::size_t begin, std::size_t count) {
    const void* const block = at(values, run.grad + begin, dtype);
    norms[run.first_block + begin / kNormBlock] = squared_norm(kernels, block, dtype, count, scratch);
  });
}

void update_locally(const ParameterUpdate& update, const std::vector<AdamWScalars>& groups) {
  const StepKernels& kernels = step_kernels();
  Scratch scratch;
  for_each_block(*update.runs, [&](const Run& run, std::size_t begin, std::size_t count) {
    update_block(update, run, begin, count, groups[run.group], kernels, scratch);
  });
}

void update_everywhere(Group& group, const ParameterUpdate& update, const std::vector<AdamWScalars>& groups,
                       bool reduce_first) {
  const SymmetricSegments& segments = group.segments();
  const std::size_t param_bytes = update.count * size_of(update.param_dtype);
  const Location grads =
      reduce_first ? segments.locate(update.grads, update.count * size_of(update.grad_dtype)) : Location{};
  const Entry entry(group,
                    Call{.kind = OpKind::kUpdateParameters,
                         .dtype = update.param_dtype,
                         .root = reduce_first ? 1 : 0,
                         .count = update.count},
                    {grads, segments.locate(update.params, param_bytes)}, [] {});
  const Everyone all_grads = reduce_first ? everyone(group, &Group::symmetric_input) : Everyone{};
  const Everyone all_params = everyone(group, &Group::symmetric_output);
  const StepKernels& kernels = step_kernels();
  const ReduceKernel average = reduce_kernel(update.grad_dtype, ReduceOp::kAvg);
  const std::size_t rank = static_cast<std::size_t>(group.rank()), n = all_params.world_size;
  Scratch scratch;
  for_each_block(*update.runs, [&](const Run& run, std::size_t begin, std::size_t count) {
    if (reduce_first) {
      const auto grads = all_grads.place((run.grad + begin) * size_of(update.grad_dtype));
      average(grads.data(), group.world_size(), &grads[rank], 1, count);
    }
    update_block(update, run, begin, count, groups[run.group], kernels, scratch);
    const auto params = all_params.place((run.param + begin) * size_of(update.param_dtype));
    for (std::size_t i = 1; i < n; ++i) {  // everyone starts elsewhere
      std::memcpy(params[(rank + i) % n], params[rank], count * size_of(update.param_dtype));
    }
  });
  group.signal(1);
  group.wait(1);
}

}  // namespace pycomm::host
