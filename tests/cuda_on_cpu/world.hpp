// The ranks of one group in one process, for tests: their pads, status words and streams.
#pragma once

#include <memory>
#include <vector>

#include "cuda/device/signal_pad.hpp"
#include "cuda/kernels/launch.hpp"

namespace cuda_on_cpu {

class World {
 public:
  World(int num_ranks, std::uint64_t timeout_ns) : statuses_(static_cast<std::size_t>(num_ranks)) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      pads_.push_back(std::make_unique<pycomm::cuda::SignalPad>());
      streams_.push_back(make_stream());
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      pycomm::cuda::Group group{};
      for (int peer = 0; peer < num_ranks; ++peer) group.pads[peer] = pads_[static_cast<std::size_t>(peer)].get();
      group.status = &statuses_[static_cast<std::size_t>(rank)];
      group.timeout_ns = timeout_ns;
      group.rank = rank;
      group.world_size = num_ranks;
      groups_.push_back(group);
    }
  }
  ~World() {
    for (const auto stream : streams_) free_stream(stream);
  }
  World(const World&) = delete;  // groups hold addresses of pads
  World& operator=(const World&) = delete;

  const pycomm::cuda::Group& group(int rank) const { return groups_[static_cast<std::size_t>(rank)]; }
  pycomm::cuda::SignalPad& pad(int rank) { return *pads_[static_cast<std::size_t>(rank)]; }
  pycomm::cuda::Status& status(int rank) { return statuses_[static_cast<std::size_t>(rank)]; }
  pycomm::cuda::LaunchShape shape(int rank, int num_blocks, int num_threads) const {
    return {num_blocks, num_threads, streams_[static_cast<std::size_t>(rank)]};
  }

 private:
  std::vector<std::unique_ptr<pycomm::cuda::SignalPad>> pads_;
  std::vector<pycomm::cuda::Status> statuses_;
  std::vector<cudaStream_t> streams_;
  std::vector<pycomm::cuda::Group> groups_;
};

}  // namespace cuda_on_cpu
