// The ranks of a group whose kernels this process launches: all of them where they are virtual, one where each rank has
// a process. Holds what kernels need beside data: signal pads in symmetric memory, status words of the host, a stream a
// rank.
//
// Launching. One thread launches call by call, the kernels of all its ranks before those of the next call. Then no
// kernel waits for one that is behind it in a hardware queue, of which a GPU has few (CUDA_DEVICE_MAX_CONNECTIONS),
// and loading a kernel, which may wait for what runs, finds only calls that are launched completely. That their blocks
// are all resident is checked by the launchers (kernels/launch.cuh).
//
// Abstract, so that builds without CUDA code need only its factory.
#pragma once

#include <memory>
#include <vector>

#include "cuda/kernels/launch.hpp"
#include "cuda/runtime/symmetric_memory.hpp"

namespace pycomm::cuda {

class RankGroup {
 public:
  virtual ~RankGroup() = default;

  virtual int world_size() const = 0;
  virtual const std::vector<int>& local_ranks() const = 0;
  /// For a kernel of a local rank. Throws std::invalid_argument for another one.
  virtual Group group(int rank) const = 0;
  virtual Stream stream(int rank) const = 0;
  /// A grid of that rank's kernel of a collective.
  LaunchShape shape(int rank, int num_blocks, int num_threads) const {
    return {num_blocks, num_threads, stream(rank), static_cast<int>(local_ranks().size())};
  }

  /// The local ranks' streams wait for what `caller` holds now; join: `caller` waits for what they hold.
  virtual void fork(Stream caller) = 0;
  virtual void join(Stream caller) = 0;

  /// Throws Error if a kernel has given up: kTimeout naming the ranks that it waited for, kPeerLost after abort().
  virtual void check() const = 0;
  /// Waits on the host until the local ranks' streams are empty, then check(). Throws Error kWaitExpired after
  /// `timeout_s`.
  virtual void wait(double timeout_s) const = 0;
  /// Kernels of this group do nothing from now on, here and on all ranks that are mapped.
  virtual void abort() = 0;

  /// For a watchdog: the word in device memory that makes a rank's kernels stop, and the host's view of the status of a
  /// local rank.
  virtual std::uint32_t* abort_word(int rank) const = 0;
  virtual const Status* status(int rank) const = 0;
};

/// `pads`: at least sizeof(SignalPad) bytes a rank, for this group alone. `timeout_s`: of each wait of a kernel.
std::unique_ptr<RankGroup> make_rank_group(std::shared_ptr<SymmetricMemory> pads, int device,
                                           std::vector<int> local_ranks, double timeout_s);

}  // namespace pycomm::cuda
