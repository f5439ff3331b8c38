// Stands in for csrc/cuda in builds without CUDA code, so that bindings are the same in every build: what would make an
// object says how to get one, and what needs one is never reached.
#include "cuda/kernels/all_gather.hpp"
#include "cuda/kernels/all_reduce.hpp"
#include "cuda/kernels/bucket.hpp"
#include "cuda/kernels/put_get.hpp"
#include "cuda/kernels/reduce_scatter.hpp"
#include "cuda/kernels/sharded_adamw.hpp"
#include "cuda/matmul/overlapped_matmul.hpp"
#include "cuda/runtime/rank_group.hpp"

namespace pycomm::cuda {
namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorKind::kUnavailable,
              "this build of pycomm has no CUDA code: install it with PYCOMM_CUDA=ON, on a machine with nvcc");
}

}  // namespace

std::unique_ptr<SymmetricMemory> virtual_rank_memory(int, int, std::size_t) { refuse(); }
std::unique_ptr<SymmetricMemory> shared_handle_memory(int, int, int, std::size_t, const ExchangeFds&) { refuse(); }
std::unique_ptr<SymmetricMemory> window_memory(int, int, const std::vector<std::byte*>&, std::size_t,
                                               std::shared_ptr<const void>) {
  refuse();
}
std::unique_ptr<RankGroup> make_rank_group(std::shared_ptr<SymmetricMemory>, int, std::vector<int>, double) {
  refuse();
}
std::unique_ptr<Multiplier> cublaslt_multiplier(int, const std::vector<std::string>&, int, int, std::size_t) {
  refuse();
}
std::size_t matmul_workspace_bytes(const MatmulCapacity&, int) { refuse(); }
std::unique_ptr<OverlappedMatmul> make_overlapped_matmul(MatmulParts, const MatmulCapacity&, const OverlapOptions&) {
  refuse();
}

void launch_all_gather(const AllGatherParams&, const LaunchShape&) { refuse(); }
std::size_t one_shot_staging_bytes(const Layout&, DType, const LaunchShape&) { refuse(); }
void launch_all_reduce_one_shot(const OneShotParams&, const LaunchShape&) { refuse(); }
void launch_all_reduce_two_shot(const TwoShotParams&, const LaunchShape&) { refuse(); }
void launch_bucket_gather(const BucketParams&, const LaunchShape&) { refuse(); }
void launch_bucket_scatter(const BucketParams&, const LaunchShape&) { refuse(); }
void launch_norm(const NormParams&, Stream) { refuse(); }
void launch_put(const PutParams&, const LaunchShape&) { refuse(); }
void launch_get(const GetParams&, const LaunchShape&) { refuse(); }
void launch_reduce_scatter(const ReduceScatterParams&, const LaunchShape&) { refuse(); }
AdamWFactors adamw_factors(const AdamWOptions&, std::int64_t) { refuse(); }
void launch_sharded_adamw(const ShardedAdamWParams&, const LaunchShape&) { refuse(); }

}  // namespace pycomm::cuda
