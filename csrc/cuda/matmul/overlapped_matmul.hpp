// Matrix products with their communication, on GPUs: enqueues the plans of plan.hpp. The host only enqueues; what
// depends on what is left to events, and between ranks to flags in symmetric memory. Abstract, so that builds without
// CUDA code need only the factories.
//
// Memory. A rank's part of the symmetric memory (matmul_workspace_bytes):
//
//   flags [kNumFlags][kMaxRanks] | kShard, 2 sets | kArrived, 2 sets of world_size parts | kReduced, 2 sets
//
// kGathered and kPartial are this rank's alone. The sum is over what peers have put into kArrived, in rank order with
// fp32 accumulation and one rounding, by reduce_scatter.cu in a group of one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda/kernels/launch.hpp"
#include "cuda/matmul/plan.hpp"
#include "cuda/runtime/symmetric_memory.hpp"
#include "pycomm/types.hpp"

namespace pycomm::cuda {

/// out [rows, out_features] = x [rows, in_features] @ weight.T, all contiguous.
struct Product {
  DType dtype;  // float32, float64, float16 or bfloat16; 16-bit ones accumulate in fp32
  std::int64_t rows, in_features, out_features;
  bool transposed;  // weight lies as [in_features, out_features]; else as [out_features, in_features]
  const void* x;
  const void* weight;
  void* out;
};

/// Enqueues products on lanes of one rank; products of different lanes may run at the same time.
class Multiplier {
 public:
  virtual ~Multiplier() = default;
  virtual void multiply(const Product& product, int lane, Stream stream) = 0;
};

/// Products by cuBLASLt, which is loaded at run time: `names` as SharedLibrary takes them. `num_multiprocessors`: that
/// products may use, 0: all. Each lane has `workspace_bytes` of device memory. Throws kUnavailable.
std::unique_ptr<Multiplier> cublaslt_multiplier(int device, const std::vector<std::string>& names, int num_lanes,
                                                int num_multiprocessors, std::size_t workspace_bytes);

/// Sends to `peer` and receives from `source` in one, on a stream: NCCL's grouped ncclSend and ncclRecv. A side of no
/// bytes is left out.
class Exchanger {
 public:
  virtual ~Exchanger() = default;
  virtual void exchange(const void* send, std::size_t send_bytes, int peer, void* receive, std::size_t receive_bytes,
                        int source, Stream stream) = 0;
};

/// The largest calls that a workspace is for.
struct MatmulCapacity {
  std::int64_t rows;        // of all ranks
  std::int64_t shard_rows;  // of the rank that has most
  std::int64_t input_row_bytes, output_row_bytes;
};

/// Of symmetric memory, each rank.
std::size_t matmul_workspace_bytes(const MatmulCapacity& capacity, int world_size);

/// What all ranks agree on.
struct MatmulCall {
  MatmulOp op;
  DType dtype;
  std::vector<std::int64_t> rows;  // of each rank's shard
  std::int64_t in_features, out_features;
  bool transposed = false;  // each rank's own choice, as the next: see Product
  bool one_by_one = false;  // the same steps on one lane, in the plan's order: nothing overlaps, the bits are the same
};

/// A rank's own tensors: any memory of its GPU.
struct MatmulTensors {
  const void* x;
  const void* weight;
  void* out;
};

struct OverlapOptions {
  int device = 0;
  PlanOptions plan;
  int reduce_blocks = 64;  // of the reduction, which takes so many multiprocessors from products at most
};

class OverlappedMatmul {
 public:
  virtual ~OverlappedMatmul() = default;

  /// Collective: all ranks give the same call, and calls in one order. Enqueues behind what `caller` holds, and what
  /// `caller` does later comes behind it. `tensors`: one a local rank. Throws std::invalid_argument before anything is
  /// enqueued.
  virtual void enqueue(const MatmulCall& call, const std::vector<MatmulTensors>& tensors, Stream caller) = 0;

  /// After all_gather_matmul, of the first local rank: all ranks' rows of x, but its own, which are not there.
  /// [rows of all, in_features] of the call, until the next all_gather_matmul.
  virtual void* gathered() const = 0;

  /// Waits on the host for the last call. Flags that do not come within `timeout_s` are set by force, so that nothing
  /// is left waiting on the device; Error kTimeout then names the ranks that did not set them, results are not defined,
  /// and this object refuses further calls. Any thread may wait, also while another one enqueues.
  virtual void wait(double timeout_s) = 0;
};

/// For the local ranks of `memory`, one Multiplier each. Without mapped memory (`memory` null: options.plan.mapped is
/// false) an exchanger moves the rows. The objects live as long as this one.
struct MatmulParts {
  std::shared_ptr<SymmetricMemory> memory;
  std::vector<int> local_ranks;
  int world_size;
  std::vector<std::unique_ptr<Multiplier>> multipliers;
  std::unique_ptr<Exchanger> exchanger;
};
std::unique_ptr<OverlappedMatmul> make_overlapped_matmul(MatmulParts parts, const MatmulCapacity& capacity,
                                                         const OverlapOptions& options);

}  // namespace pycomm::cuda
