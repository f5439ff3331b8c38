// Signals between ranks. With convert.cuh the only place with PTX, fences or atomics.
//
// Ordering. A rank's block reads and writes data, then its threads meet in __syncthreads, then one thread stores a flag
// in the peer's pad with release at system scope. A thread of the peer's block loads that flag with acquire at system
// scope until it has the expected epoch, then the block meets in __syncthreads, then its threads read and write data.
// Causality order in the PTX memory model is transitive over the two block barriers and the release-acquire pair, so
// every access of the one block before its signal happens before every access of the other block after its wait: what
// was written is seen, and what was read is not yet overwritten. What earlier kernels of the same stream did lies
// before the kernel and so before its signals; what later ones do, after its waits.
//
// Each ordering below has a name, once for the barriers of RankBarrier and once for the channels of put and get.
// tests/cuda_on_cpu weakens them one at a time: each is reported as a data race. tests/protocol does the same to a
// model of the protocol, in every interleaving.
//
// Waits are bounded. Who waits too long writes what it waited for to the host's status word and sets `abort` in every
// pad of the group. It never traps: the kernel returns, and later kernels of the group do nothing. A rank that gave up
// goes on with its stream, so its memory may change under ranks that are still at work. Hence `abort` is looked at
// after a flag has been found, too: a peer that read what had changed signalled later than `abort` was set, so nobody
// takes its result for a right one.
//
// Each rank accesses a location by one address only: PTX orders accesses by different addresses of the same memory
// ("virtual aliases") with proxy fences, of which there are none here.
//
// Follows: NCCL's LSA barrier (nccl_device/impl/lsa_barrier__funcs.h) and vLLM's custom_all_reduce.cuh.
#pragma once

#include <cstdint>

#include "cuda/device/signal_pad.hpp"
#if defined(__CUDACC__)
#include <cuda/atomic>
#endif

namespace pycomm::cuda {

enum class Ordering {
  kBarrierEnter,   // the block's threads meet before some of them signal
  kBarrierSignal,  // release of a flag
  kBarrierWait,    // acquire of a flag
  kBarrierLeave,   // the block's threads meet after some of them have waited
  kChannelEnter,   // the same, where one thread of the block signals or waits
  kChannelSignal,
  kChannelWait,
  kChannelLeave,
  kReport,  // release of the status word
};

#if defined(__CUDACC__)

using SystemFlag = ::cuda::atomic_ref<std::uint32_t, ::cuda::thread_scope_system>;

template <Ordering>
__device__ inline void store_release(std::uint32_t* flag, std::uint32_t value) {
  SystemFlag(*flag).store(value, ::cuda::std::memory_order_release);
}
template <Ordering>
__device__ inline std::uint32_t load_acquire(std::uint32_t* flag) {
  return SystemFlag(*flag).load(::cuda::std::memory_order_acquire);
}
/// For `abort`, on which no data depends.
__device__ inline void store_relaxed(std::uint32_t* flag, std::uint32_t value) {
  SystemFlag(*flag).store(value, ::cuda::std::memory_order_relaxed);
}
__device__ inline std::uint32_t load_relaxed(std::uint32_t* flag) {
  return SystemFlag(*flag).load(::cuda::std::memory_order_relaxed);
}
__device__ inline std::uint32_t exchange_relaxed(std::uint32_t* flag, std::uint32_t value) {
  return SystemFlag(*flag).exchange(value, ::cuda::std::memory_order_relaxed);
}
template <Ordering>
__device__ inline bool sync_block(bool ok) {
  return __syncthreads_and(ok) != 0;
}
/// Nanoseconds of a clock that all blocks share.
__device__ inline std::uint64_t now_ns() {
  std::uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
  return value;
}

#else  // the portable twins, on what tests/cuda_on_cpu supplies

template <Ordering kWhere>
inline void store_release(std::uint32_t* flag, std::uint32_t value) {
  cuda_on_cpu::store_release(flag, value, static_cast<int>(kWhere));
}
template <Ordering kWhere>
inline std::uint32_t load_acquire(std::uint32_t* flag) {
  return cuda_on_cpu::load_acquire(flag, static_cast<int>(kWhere));
}
inline void store_relaxed(std::uint32_t* flag, std::uint32_t value) { cuda_on_cpu::store_relaxed(flag, value); }
inline std::uint32_t load_relaxed(std::uint32_t* flag) { return cuda_on_cpu::load_relaxed(flag); }
inline std::uint32_t exchange_relaxed(std::uint32_t* flag, std::uint32_t value) {
  return cuda_on_cpu::exchange_relaxed(flag, value);
}
template <Ordering kWhere>
inline bool sync_block(bool ok) {
  return cuda_on_cpu::sync_block(ok, static_cast<int>(kWhere));
}
inline std::uint64_t now_ns() { return cuda_on_cpu::now_ns(); }

#endif

__device__ inline SignalPad& own_pad(const Group& group) { return *group.pads[group.rank]; }

/// All ranks, this one first: so that not all write to one peer at a time.
__device__ inline int nth_peer(const Group& group, int n) {
  const int peer = group.rank + n;
  return peer < group.world_size ? peer : peer - group.world_size;
}

__device__ inline bool is_aborted(const Group& group) { return load_relaxed(&own_pad(group).abort) != 0; }

/// Tell the host why this kernel gives up (the first to give up does), and every rank of the group to do so too, this
/// one first.
__device__ inline void give_up(const Group& group, StatusCode code, int waited_for, std::uint32_t expected,
                               std::uint32_t seen) {
  if (exchange_relaxed(&own_pad(group).reported, 1) == 0) {
    group.status->rank = waited_for;
    group.status->block = static_cast<int>(blockIdx.x);
    group.status->expected = expected;
    group.status->seen = seen;
    // The host reads the fields above after it has seen the code.
    store_release<Ordering::kReport>(&group.status->code, static_cast<std::uint32_t>(code));
  }
  for (int k = 0; k < group.world_size; ++k) store_relaxed(&group.pads[nth_peer(group, k)]->abort, 1);
}

/// Epochs wrap around: `seen` has reached `expected` if it is at most 2^31 - 1 ahead of it.
__device__ inline bool has_reached(std::uint32_t seen, std::uint32_t expected) {
  return static_cast<std::int32_t>(seen - expected) >= 0;
}

/// One thread: spin until `from` has brought `flag` to `expected`. False: it gave up.
template <Ordering kWhere>
__device__ inline bool wait_for(const Group& group, std::uint32_t* flag, std::uint32_t expected, int from) {
  constexpr std::uint32_t kPollsPerLook = 32;  // at the clock and, while the flag is not there, at `abort`
  const std::uint64_t started = now_ns();
  for (std::uint32_t polls = 0;; ++polls) {
    const std::uint32_t seen = load_acquire<kWhere>(flag);
    const bool is_here = has_reached(seen, expected);
    const bool looks = polls % kPollsPerLook == 0;
    if ((is_here || looks) && is_aborted(group)) {
      give_up(group, StatusCode::kAborted, from, expected, seen);
      return false;
    }
    if (is_here) return true;
    if (looks && now_ns() - started > group.timeout_ns) {
      give_up(group, StatusCode::kExpired, from, expected, seen);
      return false;
    }
  }
}

/// The whole block: what its threads did before happens before what a peer's block does after waiting for `value`.
__device__ inline void signal_from_block(std::uint32_t* flag, std::uint32_t value) {
  sync_block<Ordering::kChannelEnter>(true);
  if (threadIdx.x == 0) store_release<Ordering::kChannelSignal>(flag, value);
}

/// The whole block waits, and all its threads get the same answer.
__device__ inline bool wait_in_block(const Group& group, std::uint32_t* flag, std::uint32_t expected, int from) {
  bool ok = true;
  if (threadIdx.x == 0) ok = wait_for<Ordering::kChannelWait>(group, flag, expected, from);
  return sync_block<Ordering::kChannelLeave>(ok);
}

/// Barriers of this block with the same block of every other rank; at least kMaxRanks threads a block. All ranks launch
/// kernels of a group in one order, each with the same number of blocks and barriers everywhere. A group of one rank
/// needs no pad and has no limit of blocks.
class RankBarrier {
 public:
  __device__ explicit RankBarrier(const Group& group)
      : group_(group),
        epoch_(group.world_size == 1 ? 0 : own_pad(group).epoch[blockIdx.x]),
        was_aborted_(group.world_size > 1 && is_aborted(group)) {}

  /// Barriers that this block has passed since the group was made.
  __device__ std::uint32_t epoch() const { return epoch_; }

  /// The group had been given up before this kernel began: nothing may be written, and the first wait() says false.
  __device__ bool was_aborted() const { return was_aborted_; }

  /// False, in all threads alike: gave up; return from the kernel without touching a peer's memory again.
  __device__ bool wait() {
    if (group_.world_size == 1) return true;
    // No signal after an abort: a flag that was raised before it would be set back.
    if (!sync_block<Ordering::kBarrierEnter>(!was_aborted_)) {
      if (threadIdx.x == 0) give_up(group_, StatusCode::kAborted, group_.rank, epoch_ + 1, epoch_);
      return false;
    }
    ++epoch_;
    bool ok = true;
    const int peer = static_cast<int>(threadIdx.x);
    if (peer < group_.world_size) {  // this rank's own pad too: then it looks at `abort` like any other
      std::uint32_t* const theirs = &group_.pads[peer]->barrier[blockIdx.x][group_.rank];
      store_release<Ordering::kBarrierSignal>(theirs, epoch_);
      std::uint32_t* const ours = &own_pad(group_).barrier[blockIdx.x][peer];
      ok = wait_for<Ordering::kBarrierWait>(group_, ours, epoch_, peer);
    }
    return sync_block<Ordering::kBarrierLeave>(ok);
  }

  /// After the last wait(): remember the epoch for the next kernel. Every thread has read it before that wait.
  __device__ void finish() {
    if (threadIdx.x == 0 && group_.world_size > 1) own_pad(group_).epoch[blockIdx.x] = epoch_;
  }

 private:
  const Group& group_;
  std::uint32_t epoch_;
  const bool was_aborted_;
};

}  // namespace pycomm::cuda
