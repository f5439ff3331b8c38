// The two fused collectives of data-parallel training, on symmetric memory: averaging gradients with their norms, and
// an optimizer step on this rank's shard that leaves the new parameters on every rank.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "host/group.hpp"
#include "host/step_kernels.hpp"

namespace pycomm::host {

inline constexpr std::size_t kNormBlock = 1024;  // elements, from each parameter's start

/// Consecutive elements of one parameter that belong to one rank: whole norm blocks, but for the parameter's end.
/// Every position counts elements.
struct Run {
  std::uint64_t grad;         // in the bucket
  std::uint64_t param;        // in the buffer of parameters
  std::uint64_t packed;       // among all elements that this rank owns
  std::uint64_t count;        //
  std::uint64_t first_block;  // in the table of norms
  std::uint64_t group;        // of parameters, with AdamWScalars of its own
};
using Runs = std::shared_ptr<const std::vector<Run>>;

struct GradientReduction {
  void* grads = nullptr;  // [count], symmetric
  std::size_t count = 0;
  DType dtype = DType::kFloat32;
  Runs runs;
  bool to_all = true;     // the average goes to every rank's bucket; else only this rank's runs are reduced
  void* shard = nullptr;  // where the average of this rank's runs goes, packed; nullptr: to its bucket
  DType shard_dtype = DType::kFloat32;
  double* norms = nullptr;  // [blocks of all parameters]: those of this rank's runs are written
};

/// Average the runs' gradients over all ranks. `accumulate`: add the average to what the shard has.
void reduce_gradients(Group& group, const GradientReduction& reduction, bool accumulate);

/// norms[block] of the runs' elements of `values`, at the runs' `grad` position.
void block_norms(const void* values, DType dtype, const std::vector<Run>& runs, double* norms);

struct ParameterUpdate {
  void* grads = nullptr;  // averages
  DType grad_dtype = DType::kFloat32;
  bool grads_packed = false;  // gradients lie at Run::packed, else at Run::grad
  void* params = nullptr;     // [count]
  std::size_t count = 0;
  DType param_dtype = DType::kFloat32;
  float* master = nullptr;  // packed; nullptr: the parameters themselves are fp32
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  Runs runs;
};

/// AdamW on this rank's runs, here only.
void update_locally(const ParameterUpdate& update, const std::vector<AdamWScalars>& groups);

/// The same, and the new parameters are written to every rank's symmetric buffer. `reduce_first`: the gradients are a
/// symmetric buffer of local ones; each block is averaged over the ranks, into it, on the way.
void update_everywhere(Group& group, const ParameterUpdate& update, const std::vector<AdamWScalars>& groups,
                       bool reduce_first);

}  // namespace pycomm::host
