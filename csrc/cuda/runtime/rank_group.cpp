#include "cuda/runtime/rank_group.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "cuda/runtime/handles.hpp"
#include "pycomm/deadline.hpp"

namespace pycomm::cuda {
namespace {

class DeviceRankGroup final : public RankGroup {
 public:
  DeviceRankGroup(std::shared_ptr<SymmetricMemory> pads, int device, std::vector<int> local_ranks, double timeout_s)
      : pads_(std::move(pads)),
        device_(device),
        local_ranks_(std::move(local_ranks)),
        timeout_s_(timeout_s),
        statuses_(OwnedMemory::on_host(kMaxRanks * sizeof(Status))),
        aborting_(OwnedStream::Priority::kHighest),
        streams_(local_ranks_.size()),
        ends_(local_ranks_.size()) {
    std::fill_n(statuses_.data(), kMaxRanks * sizeof(Status), std::byte{});
  }

  int world_size() const override { return pads_->world_size(); }
  const std::vector<int>& local_ranks() const override { return local_ranks_; }

  Group group(int rank) const override {
    static_cast<void>(index_of(rank));
    Group group{};
    for (int peer = 0; peer < world_size(); ++peer) group.pads[peer] = pad(peer);
    group.status = static_cast<Status*>(statuses_.on_this_device()) + rank;
    group.timeout_ns = static_cast<std::uint64_t>(std::min(timeout_s_, kLongest) * 1e9);
    group.rank = rank;
    group.world_size = world_size();
    return group;
  }

  Stream stream(int rank) const override { return streams_[index_of(rank)].get(); }

  void fork(Stream caller) override {
    const DeviceScope scope(device_);
    start_.record(caller);
    for (const OwnedStream& stream : streams_) start_.make_wait(stream.get());
  }
  void join(Stream caller) override {
    const DeviceScope scope(device_);
    for (std::size_t i = 0; i < streams_.size(); ++i) {
      ends_[i].record(streams_[i].get());
      ends_[i].make_wait(caller);
    }
  }

  void check() const override {
    std::vector<int> missing;
    std::string what;
    bool aborted = false;
    for (const int rank : local_ranks_) {
      Status& status = reinterpret_cast<Status*>(statuses_.data())[rank];
      // The kernel wrote the other fields before it released this one (signal.cuh, give_up).
      const auto code = std::atomic_ref(status.code).load(std::memory_order_acquire);
      if (code == static_cast<std::uint32_t>(StatusCode::kAborted)) aborted = true;
      if (code != static_cast<std::uint32_t>(StatusCode::kExpired)) continue;
      what += (what.empty() ? "" : "; ") + ("rank " + std::to_string(rank)) + " waited for rank " +
              std::to_string(status.rank) + " (block " + std::to_string(status.block) + ", expected epoch " +
              std::to_string(status.expected) + ", saw " + std::to_string(status.seen) + ")";
      if (std::find(missing.begin(), missing.end(), status.rank) == missing.end()) missing.push_back(status.rank);
    }
    if (!missing.empty()) {
      Error error(ErrorKind::kTimeout,
                  "a kernel gave up after " + std::to_string(timeout_s_) + " s: " + what + "; the group is unusable");
      error.ranks = std::move(missing);
      throw error;
    }
    if (aborted) throw Error(ErrorKind::kPeerLost, "a kernel stopped: the group was aborted");
  }

  void wait(double timeout_s) const override {
    const DeviceScope scope(device_);
    const Deadline deadline = Deadline::after(timeout_s);
    for (const OwnedStream& stream : streams_) {
      for (cudaError_t status = cudaStreamQuery(stream.get()); status != cudaSuccess;
           status = cudaStreamQuery(stream.get())) {
        if (status != cudaErrorNotReady) PYCOMM_CUDA_CHECK(status);
        if (deadline.expired()) {
          throw Error(ErrorKind::kWaitExpired, "kernels are still running after " + std::to_string(timeout_s) + " s");
        }
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    }
    check();
  }

  void abort() override {
    const DeviceScope scope(device_);
    for (int rank = 0; rank < world_size(); ++rank) {
      PYCOMM_CUDA_CHECK(cudaMemsetAsync(&pad(rank)->abort, 1, sizeof(SignalPad::abort), aborting_.get()));
    }
  }

  std::uint32_t* abort_word(int rank) const override { return &pad(rank)->abort; }
  const Status* status(int rank) const override {
    static_cast<void>(index_of(rank));
    return reinterpret_cast<const Status*>(statuses_.data()) + rank;
  }

 private:
  static constexpr double kLongest = 1e9;  // seconds, keeps the nanoseconds in range

  SignalPad* pad(int rank) const { return reinterpret_cast<SignalPad*>(pads_->part(rank)); }
  std::size_t index_of(int rank) const {
    const auto found = std::find(local_ranks_.begin(), local_ranks_.end(), rank);
    if (found != local_ranks_.end()) return static_cast<std::size_t>(found - local_ranks_.begin());
    throw std::invalid_argument("rank " + std::to_string(rank) + " is not one of this process");
  }

  std::shared_ptr<SymmetricMemory> pads_;
  int device_;
  std::vector<int> local_ranks_;
  double timeout_s_;
  OwnedMemory statuses_;
  OwnedStream aborting_;  // not one that kernels may be waiting on
  std::vector<OwnedStream> streams_;
  Event start_;
  std::vector<Event> ends_;
};

}  // namespace

std::unique_ptr<RankGroup> make_rank_group(std::shared_ptr<SymmetricMemory> pads, int device,
                                           std::vector<int> local_ranks, double timeout_s) {
  if (pads->bytes() < sizeof(SignalPad)) {
    throw std::invalid_argument("signal pads of " + std::to_string(pads->bytes()) +
                                " bytes: " + std::to_string(sizeof(SignalPad)) + " are needed");
  }
  if (local_ranks.empty() || !(timeout_s > 0)) {
    throw std::invalid_argument("a group needs at least one local rank and a timeout of more than 0 s");
  }
  for (const int rank : local_ranks) {
    if (rank < 0 || rank >= pads->world_size()) {
      throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(pads->world_size()));
    }
  }
  const DeviceScope scope(device);
  return std::make_unique<DeviceRankGroup>(std::move(pads), device, std::move(local_ranks), timeout_s);
}

}  // namespace pycomm::cuda
