// The fused step of ZeRO: reduce-scatter, AdamW and all-gather as one pass over symmetric memory. n ranks, P
// parameters.
//
//   barrier  every rank's gradients are there, and nobody reads its parameters any more
//   update   rank r, for its P/n parameters: reduce the gradients of ranks 0 … n-1, scale them by the clip factor,
//            AdamW on its fp32 master copy and moments, store the new parameters to ranks 0 … n-1
//   barrier  every rank's parameters are there, and its gradients may be overwritten
//
// Per own parameter a rank loads n gradients, master copy and two moments, and stores these three and n parameters. As
// three steps, the reduced gradient and the updated parameter would be stored and loaded once more. The barriers and
// their argument are those of two-shot all-reduce (all_reduce.cu): only rank r touches part r of anything in between.
//
// Clipping needs the norm of all gradients first. Then reduce_scatter.cu leaves the reduced gradient in fp32 and its
// squares with every rank, norm (bucket.cu) makes the factor, and this kernel takes the one reduced gradient.
//
// AdamW is torch.optim.AdamW's, in fp32, one rounding an operation, in this order:
//
//   p = p * (1 - lr * weight_decay)
//   m = m + (g - m) * (1 - beta1)
//   v = v * beta2 + g * g * (1 - beta2)
//   p = p - m / (sqrt(v) / sqrt(1 - beta2 ** step) + eps) * step_size        step_size = lr / (1 - beta1 ** step)
//
// Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019); Rajbhandari et al., "ZeRO" (2020).
#include <cmath>

#include "cuda/device/reduce_chunks.cuh"
#include "cuda/device/signal.cuh"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/sharded_adamw.hpp"

namespace pycomm::cuda {
namespace {

struct Moments {
  Elements<float> master, exp_avg, exp_avg_sq;
};

__device__ inline void step(const AdamWFactors& f, const float (&grad)[kGroup], Moments& state) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float g = grad[i];
    const float m = state.exp_avg.at[i] + (g - state.exp_avg.at[i]) * f.one_minus_beta1;
    const float v = state.exp_avg_sq.at[i] * f.beta2 + g * g * f.one_minus_beta2;
    const float denominator = sqrtf(v) / f.bias2 + f.eps;
    state.master.at[i] = state.master.at[i] * f.decay - m / denominator * f.step_size;
    state.exp_avg.at[i] = m;
    state.exp_avg_sq.at[i] = v;
  }
}

template <class Grad, class Param>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sharded_adamw_kernel(const __grid_constant__ ShardedAdamWParams params) {
  const ReduceOp op = params.average ? ReduceOp::kAvg : ReduceOp::kSum;
  RankBarrier barrier(params.group);
  if (!barrier.wait()) return;
  // A step with gradients that are not finite changes nothing; every rank decides it on the same sum.
  const bool skip = params.clip != nullptr && params.clip->skip != 0;
  const float scale = params.clip != nullptr ? params.clip->scale : 1.0F;
  for_each_chunk(0, skip ? 0 : params.layout.num_chunks, [&](std::int64_t index, std::int64_t) {
    const Chunk chunk = chunk_at(params.layout, index);
    const auto source = [&](int peer) { return static_cast<const Grad*>(params.grads[peer]) + chunk.first; };
    const auto target = [&](int peer) { return static_cast<Param*>(params.params[peer]) + chunk.first; };
    for_each_group(chunk, [&](int at, int num) {
      float grad[kGroup];
      reduce<Grad>(source, params.num_grads, at, num, op, grad);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) grad[i] *= scale;
      const std::int64_t place = chunk.first + at;
      Moments state{{}, load(params.exp_avg + place, num), load(params.exp_avg_sq + place, num)};
      if (params.master != nullptr) {
        state.master = load(params.master + place, num);
      } else if constexpr (std::is_same_v<Param, float>) {
        state.master = load(target(params.group.rank) + at, num);
      }
      step(params.factors, grad, state);
      store(params.exp_avg + place, state.exp_avg, num);
      store(params.exp_avg_sq + place, state.exp_avg_sq, num);
      if (params.master != nullptr) store(params.master + place, state.master, num);
      Elements<Param> result;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) result.at[i] = from_float<Param>(state.master.at[i]);
      store_to_all(params.group, target, at, result, num);
    });
  });
  if (!barrier.wait()) return;
  barrier.finish();
}

}  // namespace

AdamWFactors adamw_factors(const AdamWOptions& options, std::int64_t step) {
  const auto steps = static_cast<double>(step);
  AdamWFactors factors{};
  factors.decay = static_cast<float>(1 - options.lr * options.weight_decay);
  factors.beta2 = static_cast<float>(options.beta2);
  factors.one_minus_beta1 = static_cast<float>(1 - options.beta1);
  factors.one_minus_beta2 = static_cast<float>(1 - options.beta2);
  factors.step_size = static_cast<float>(options.lr / (1 - std::pow(options.beta1, steps)));
  factors.bias2 = static_cast<float>(std::sqrt(1 - std::pow(options.beta2, steps)));
  factors.eps = static_cast<float>(options.eps);
  return factors;
}

void launch_sharded_adamw(const ShardedAdamWParams& params, const LaunchShape& shape) {
  constexpr const char* kName = "sharded_adamw";
  check_group(kName, params.group);
  check_shape(kName, shape, max_blocks_of(params.group));
  if (params.num_grads != 1 && params.num_grads != params.group.world_size) {
    throw std::invalid_argument(std::string(kName) + ": " + std::to_string(params.num_grads) + " gradients for " +
                                std::to_string(params.group.world_size) + " ranks; one a rank, or one reduced");
  }
  if (params.master == nullptr && params.param_dtype != DType::kFloat32) {
    throw std::invalid_argument(std::string(kName) + ": parameters of dtype " + name_of(params.param_dtype) +
                                " need a master copy in float32");
  }
  dispatch_float(kName, params.grad_dtype, [&](auto grad) {
    dispatch_float(kName, params.param_dtype, [&](auto param) {
      launch(kName, sharded_adamw_kernel<typename decltype(grad)::Type, typename decltype(param)::Type>, shape, params);
    });
  });
}

}  // namespace pycomm::cuda
