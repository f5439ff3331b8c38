#include "cuda/matmul/overlapped_matmul.hpp"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <tuple>

#include "cuda/kernels/reduce_scatter.hpp"
#include "cuda/matmul/workspace.hpp"
#include "cuda/runtime/handles.hpp"
#include "cuda/runtime/stream_flags.hpp"
#include "pycomm/deadline.hpp"

namespace pycomm::cuda {
namespace {

constexpr int kReduceThreads = 512;
constexpr std::uint32_t kForced = 1U << 30;  // added to a flag, it ends every wait for it

std::uint32_t wrapped(std::int64_t value) { return static_cast<std::uint32_t>(value); }

/// A rank of this process: its streams, and its own memory.
struct LocalRank {
  LocalRank(int the_rank, std::unique_ptr<Multiplier> the_multiplier, std::size_t bytes)
      : rank(the_rank), multiplier(std::move(the_multiplier)), memory(OwnedMemory::on_device(bytes)) {}

  int rank;
  std::unique_ptr<Multiplier> multiplier;
  OwnedMemory memory;
  std::vector<OwnedStream> lanes;
  std::vector<Event> lane_ends;
  std::vector<Event> step_ends;  // by step, of those that another lane waits for
  Plan plan;                     // of the call that is being enqueued, or was last
};

class DeviceOverlappedMatmul final : public OverlappedMatmul {
 public:
  DeviceOverlappedMatmul(MatmulParts parts, const MatmulCapacity& capacity, const OverlapOptions& options)
      : memory_(std::move(parts.memory)),
        world_size_(parts.world_size),
        exchanger_(std::move(parts.exchanger)),
        capacity_(capacity),
        options_(options),
        layout_(capacity, parts.world_size, options.plan.mapped),
        forcing_(OwnedStream::Priority::kHighest) {
    // Without mapped memory kArrived and kReduced are this rank's own as well.
    const std::size_t bytes = layout_.own_bytes + (options.plan.mapped ? 0 : layout_.shared_bytes);
    for (std::size_t i = 0; i < parts.local_ranks.size(); ++i) {
      ranks_.emplace_back(parts.local_ranks[i], std::move(parts.multipliers[i]), bytes);
    }
  }

  void enqueue(const MatmulCall& call, const std::vector<MatmulTensors>& tensors, Stream caller) override {
    const std::lock_guard lock(enqueuing_);
    check_call(call, tensors);
    const DeviceScope scope(options_.device);
    ++call_;
    start_.record(caller);
    for (LocalRank& rank : ranks_) {
      rank.plan = make_plan(call.op, rank.rank, call.rows, options_.plan);
      while (static_cast<int>(rank.lanes.size()) < rank.plan.num_lanes) {
        rank.lanes.emplace_back();
        rank.lane_ends.emplace_back();
      }
      while (rank.step_ends.size() < rank.plan.steps.size()) rank.step_ends.emplace_back();
      for (const OwnedStream& lane : rank.lanes) {
        start_.make_wait(lane.get());
        if (call_ > 1) end_.make_wait(lane.get());  // buffers are used again, perhaps from another stream
      }
    }
    enqueue_steps(call, tensors);
    for (LocalRank& rank : ranks_) {
      for (std::size_t i = 0; i < rank.lanes.size(); ++i) {
        rank.lane_ends[i].record(rank.lanes[i].get());
        rank.lane_ends[i].make_wait(caller);
      }
    }
    end_.record(caller);
  }

  void* gathered() const override { return ranks_.front().memory.data() + layout_.gathered; }

  void wait(double timeout_s) override {
    const DeviceScope scope(options_.device);
    for (const Deadline deadline = Deadline::after(timeout_s); !is_over();) {
      if (deadline.expired()) give_up(timeout_s);
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  bool is_over() {
    const std::lock_guard lock(enqueuing_);
    return call_ == 0 || end_.passed();
  }

  void check_call(const MatmulCall& call, const std::vector<MatmulTensors>& tensors) const {
    if (failed_) throw Error(ErrorKind::kGeneral, "overlapped matmul: an earlier call failed; make a new one");
    const auto total = std::accumulate(call.rows.begin(), call.rows.end(), std::int64_t{0});
    const auto most = call.rows.empty() ? 0 : *std::max_element(call.rows.begin(), call.rows.end());
    const auto row_bytes = [&](std::int64_t count) { return count * static_cast<std::int64_t>(size_of(call.dtype)); };
    if (static_cast<int>(call.rows.size()) != world_size_ || tensors.size() != ranks_.size()) {
      throw std::invalid_argument("overlapped matmul: rows of " + std::to_string(call.rows.size()) +
                                  " ranks and tensors of " + std::to_string(tensors.size()) + "; it was made for " +
                                  std::to_string(world_size_) + " ranks, " + std::to_string(ranks_.size()) + " here");
    }
    if (!is_floating_point(call.dtype) || call.in_features < 1 || call.out_features < 1) {
      throw std::invalid_argument("overlapped matmul: " + std::string(name_of(call.dtype)) + ", " +
                                  std::to_string(call.in_features) + " to " + std::to_string(call.out_features) +
                                  " features; it takes floating-point tensors and at least one feature each");
    }
    if (total > capacity_.rows || most > capacity_.shard_rows ||
        row_bytes(call.in_features) > capacity_.input_row_bytes ||
        row_bytes(call.out_features) > capacity_.output_row_bytes) {
      throw std::invalid_argument("overlapped matmul: a call of " + std::to_string(total) + " rows, " +
                                  std::to_string(most) + " of one rank, " + std::to_string(call.in_features) + " to " +
                                  std::to_string(call.out_features) + " features is larger than the workspace");
    }
  }

  /// Rank by rank, each as far as the flags that it waits for have been enqueued here: whatever hardware queues streams
  /// share, nothing then waits for what lies behind it. Ranks of other processes enqueue on their own.
  void enqueue_steps(const MatmulCall& call, const std::vector<MatmulTensors>& tensors) {
    std::set<std::tuple<int, int, int, int>> set_flags;  // whose, flag, by, piece
    std::vector<std::size_t> next(ranks_.size());
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t i = 0; i < ranks_.size(); ++i) {
        const LocalRank& rank = ranks_[i];
        for (; next[i] < rank.plan.steps.size(); ++next[i]) {
          const Step& step = rank.plan.steps[next[i]];
          const int flag = static_cast<int>(step.flag);
          if (step.kind == StepKind::kAwait && is_local(step.peer) &&
              !set_flags.contains({rank.rank, flag, step.peer, step.piece})) {
            break;
          }
          if (step.kind == StepKind::kSignal) set_flags.insert({step.peer, flag, rank.rank, step.piece});
          enqueue_step(call, tensors[i], ranks_[i], next[i]);
          moved = true;
        }
      }
    }
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      if (next[i] != ranks_[i].plan.steps.size()) throw std::logic_error("overlapped matmul: the plans wait in a ring");
    }
  }

  void enqueue_step(const MatmulCall& call, const MatmulTensors& tensors, LocalRank& rank, std::size_t index) {
    const Step& step = rank.plan.steps[index];
    const Stream stream = rank.lanes[call.one_by_one ? 0 : static_cast<std::size_t>(step.lane)].get();
    for (const int before : step.after) {
      const auto i = static_cast<std::size_t>(before);
      if (rank.plan.steps[i].lane != step.lane) rank.step_ends[i].make_wait(stream);
    }
    const auto address = [&](const Place& place) { return address_of(call, tensors, rank, place); };
    const auto bytes = [&](const Place& place) {
      return static_cast<std::size_t>((place.end - place.begin) * row_bytes(call, place.buffer));
    };
    switch (step.kind) {
      case StepKind::kCopy:
        if (bytes(step.to) > 0) {
          PYCOMM_CUDA_CHECK(
              cudaMemcpyAsync(address(step.to), address(step.from), bytes(step.to), cudaMemcpyDefault, stream));
        }
        break;
      case StepKind::kMultiply:
        if (step.to.end > step.to.begin) {
          rank.multiplier->multiply({call.dtype, step.to.end - step.to.begin, call.in_features, call.out_features,
                                     call.transposed, address(step.from), tensors.weight, address(step.to)},
                                    step.lane, stream);
        }
        break;
      case StepKind::kReduce:
        reduce(call, step, address, stream);
        break;
      case StepKind::kSignal:
        set_flag(stream, flag(step.peer, step.flag, rank.rank), wrapped(flag_value(call_, step.piece)));
        break;
      case StepKind::kAwait:
        await_flag(stream, flag(rank.rank, step.flag, step.peer), wrapped(flag_value(call_, step.piece)));
        break;
      case StepKind::kExchange:
        exchanger_->exchange(address(step.from), bytes(step.from), step.peer, address(step.to), bytes(step.to),
                             step.source, stream);
        break;
    }
    if (step.has_waiter) rank.step_ends[index].record(stream);
  }

  template <class Address>
  void reduce(const MatmulCall& call, const Step& step, const Address& address, Stream stream) const {
    const std::int64_t count = (step.to.end - step.to.begin) * call.out_features;
    if (count == 0) return;
    ReduceScatterParams params{};
    params.group.world_size = 1;
    params.dtype = params.output_dtype = call.dtype;
    params.op = ReduceOp::kSum;
    params.layout = flat_layout(count);
    params.num_inputs = world_size_;
    for (int part = 0; part < world_size_; ++part) {
      Place from = step.from;
      from.part = part;
      params.input[part] = address(from);
    }
    params.output = address(step.to);
    const auto blocks = std::min<std::int64_t>(options_.reduce_blocks, params.layout.num_chunks);
    launch_reduce_scatter(params, {static_cast<int>(blocks), kReduceThreads, stream});
  }

  static std::int64_t row_bytes(const MatmulCall& call, Buffer buffer) {
    const bool is_input = buffer == Buffer::kInput || buffer == Buffer::kShard || buffer == Buffer::kGathered;
    return (is_input ? call.in_features : call.out_features) * static_cast<std::int64_t>(size_of(call.dtype));
  }

  std::byte* address_of(const MatmulCall& call, const MatmulTensors& tensors, const LocalRank& rank,
                        const Place& place) const {
    const auto set = static_cast<std::size_t>(call_ % 2);
    std::byte* const shared = options_.plan.mapped ? memory_->part(place.rank) : rank.memory.data() + layout_.own_bytes;
    const auto base = [&]() -> std::byte* {
      switch (place.buffer) {
        case Buffer::kInput:
          return static_cast<std::byte*>(const_cast<void*>(tensors.x));  // never written: plans only read it
        case Buffer::kOutput:
          return static_cast<std::byte*>(tensors.out);
        case Buffer::kShard:
          return shared + layout_.shard[set];
        case Buffer::kGathered:
          return rank.memory.data() + layout_.gathered;
        case Buffer::kPartial:
          return rank.memory.data() + layout_.partial;
        case Buffer::kArrived:
          return shared + layout_.arrived[set] + layout_.part_bytes * static_cast<std::size_t>(place.part);
        case Buffer::kReduced:
          return shared + layout_.reduced[set];
      }
      return nullptr;
    };
    return base() + place.begin * row_bytes(call, place.buffer);
  }

  std::uint32_t* flag(int owner, Flag which, int by) const {
    return reinterpret_cast<std::uint32_t*>(memory_->part(owner)) + static_cast<int>(which) * kMaxRanks + by;
  }

  bool is_local(int rank) const {
    return std::any_of(ranks_.begin(), ranks_.end(), [&](const LocalRank& local) { return local.rank == rank; });
  }

  [[noreturn]] void give_up(double timeout_s) {
    const std::lock_guard lock(enqueuing_);  // the plan is that of a call that has been enqueued as a whole
    failed_ = true;
    std::set<int> missing;
    if (memory_ != nullptr) {
      for (const LocalRank& rank : ranks_) force_flags(rank, missing);
    }
    std::string names;
    for (const int rank : missing) names += (names.empty() ? "" : ", ") + std::to_string(rank);
    Error error(ErrorKind::kTimeout, "overlapped matmul: call " + std::to_string(call_) + " is not over after " +
                                         std::to_string(timeout_s) + " s" +
                                         (names.empty() ? "" : ": nothing came from rank(s) " + names));
    error.op = "overlapped matmul";
    error.seq = static_cast<std::uint64_t>(call_);
    error.ranks.assign(missing.begin(), missing.end());
    throw error;
  }

  /// On a stream of its own, which no flag holds up: sees what this rank still waits for, and sets it.
  void force_flags(const LocalRank& rank, std::set<int>& missing) const {
    std::uint32_t* const flags = flag(rank.rank, Flag{}, 0);
    constexpr std::size_t kCount = kNumFlags * kMaxRanks;
    OwnedMemory seen = OwnedMemory::on_host(kCount * sizeof(std::uint32_t));
    auto* const values = reinterpret_cast<std::uint32_t*>(seen.data());
    PYCOMM_CUDA_CHECK(
        cudaMemcpyAsync(values, flags, kCount * sizeof(std::uint32_t), cudaMemcpyDefault, forcing_.get()));
    PYCOMM_CUDA_CHECK(cudaStreamSynchronize(forcing_.get()));
    const Step* first = nullptr;  // that waits in vain; later ones may wait for ranks that wait themselves
    for (const Step& step : rank.plan.steps) {
      if (step.kind != StepKind::kAwait) continue;
      const std::uint32_t wanted = wrapped(flag_value(call_, step.piece));
      const int index = static_cast<int>(step.flag) * kMaxRanks + step.peer;
      if (static_cast<std::int32_t>(values[index] - wanted) < 0) {
        if (first == nullptr) first = &step;
        if (step.flag == first->flag) missing.insert(step.peer);
      }
      set_flag(forcing_.get(), flags + index, wrapped(flag_value(call_, 0)) + kForced);
    }
    PYCOMM_CUDA_CHECK(cudaStreamSynchronize(forcing_.get()));
  }

  std::shared_ptr<SymmetricMemory> memory_;
  int world_size_;
  std::unique_ptr<Exchanger> exchanger_;
  MatmulCapacity capacity_;
  OverlapOptions options_;
  WorkspaceLayout layout_;
  OwnedStream forcing_;
  std::vector<LocalRank> ranks_;
  Event start_, end_;
  std::mutex enqueuing_;
  std::int64_t call_ = 0;
  bool failed_ = false;
};

}  // namespace

std::size_t matmul_workspace_bytes(const MatmulCapacity& capacity, int world_size) {
  return WorkspaceLayout(capacity, world_size, true).shared_bytes;
}

std::unique_ptr<OverlappedMatmul> make_overlapped_matmul(MatmulParts parts, const MatmulCapacity& capacity,
                                                         const OverlapOptions& options) {
  const bool has_mapped_memory = parts.memory != nullptr;
  if (options.plan.mapped != has_mapped_memory || (!has_mapped_memory && parts.exchanger == nullptr)) {
    throw std::invalid_argument("overlapped matmul: it takes symmetric memory, or an exchanger and no mapped memory");
  }
  if (parts.multipliers.size() != parts.local_ranks.size() || parts.local_ranks.empty() || parts.world_size < 1 ||
      parts.world_size > kMaxRanks || (!has_mapped_memory && parts.local_ranks.size() != 1)) {
    throw std::invalid_argument("overlapped matmul: " + std::to_string(parts.multipliers.size()) + " multipliers for " +
                                std::to_string(parts.local_ranks.size()) +
                                " local ranks; one each, and a single local rank where memory is not mapped");
  }
  if (has_mapped_memory && (parts.memory->world_size() != parts.world_size ||
                            parts.memory->bytes() < matmul_workspace_bytes(capacity, parts.world_size))) {
    throw std::invalid_argument("overlapped matmul: symmetric memory of " + std::to_string(parts.memory->bytes()) +
                                " bytes for " + std::to_string(parts.memory->world_size()) + " ranks; " +
                                std::to_string(matmul_workspace_bytes(capacity, parts.world_size)) + " bytes for " +
                                std::to_string(parts.world_size) + " are needed");
  }
  const DeviceScope scope(options.device);
  return std::make_unique<DeviceOverlappedMatmul>(std::move(parts), capacity, options);
}

}  // namespace pycomm::cuda
