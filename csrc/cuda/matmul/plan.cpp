#include "cuda/matmul/plan.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace pycomm::cuda {
namespace {

/// A plan in the making. Lanes: `multiply` ones first, then one for this rank's own memory, then one a peer (exchanges:
/// one in all, since a communicator of NCCL does one thing after another).
class Planner {
 public:
  Planner(MatmulOp op, int rank, const std::vector<std::int64_t>& rows, const PlanOptions& options)
      : rank_(rank), n_(static_cast<int>(rows.size())), rows_(rows), options_(options) {
    // Only gathered rows arrive in any order; products that nothing arrives for are one after the other.
    num_multiply_ = op == MatmulOp::kAllGatherMatmul ? std::min(options.num_lanes, n_) : 1;
    plan_.num_multiply_lanes = num_multiply_;
    plan_.num_lanes = num_multiply_ + (n_ == 1 ? 0 : options.mapped ? n_ : 1);
    first_.push_back(0);
    for (const std::int64_t count : rows) first_.push_back(first_.back() + count);
  }

  void all_gather_matmul() {
    if (options_.mapped && n_ > 1) share_input();
    multiply(0, input(0, rows_of(rank_)), output(first_of(rank_), rows_of(rank_)), {});
    for (int k = 1; k < n_; ++k) {
      if (!options_.mapped) {
        const int to = (rank_ + n_ - k) % n_;
        const int from = (rank_ + k) % n_;
        const int step = exchange(to, input(0, rows_of(rank_)), from, all_rows(Buffer::kGathered, from), {});
        multiply(k % num_multiply_, all_rows(Buffer::kGathered, from), all_rows(Buffer::kOutput, from), {step});
        continue;
      }
      const int peer = (rank_ + k) % n_;
      for (int piece = 0; piece < options_.num_pieces; ++piece) {
        const auto [begin, end] = piece_of(peer, piece);
        if (piece == 0) await(lane_of(peer), Flag::kReady, peer, 0);
        const int step = copy(lane_of(peer), {peer, Buffer::kShard, 0, begin, end},
                              {rank_, Buffer::kGathered, 0, first_of(peer) + begin, first_of(peer) + end}, {});
        multiply(k % num_multiply_, plan_.steps[at(step)].to, output(first_of(peer) + begin, end - begin), {step});
      }
    }
  }

  /// Returns the steps that reduce.
  std::vector<int> matmul_reduce_scatter(Buffer reduced) {
    if (n_ == 1) return {multiply(0, input(0, rows_of(rank_)), output(0, rows_of(rank_)), {})};
    std::vector<int> own(at(options_.num_pieces));
    std::vector<int> received;
    for (int k = 1; k <= n_; ++k) {
      const int owner = (rank_ + k) % n_;
      for (int piece = 0; piece < options_.num_pieces; ++piece) {
        const auto [begin, end] = piece_of(owner, piece);
        const Place from{rank_, Buffer::kInput, 0, first_of(owner) + begin, first_of(owner) + end};
        if (owner == rank_) {
          own[at(piece)] = multiply(0, from, {rank_, Buffer::kArrived, rank_, begin, end}, {});
          continue;
        }
        const int product =
            multiply(0, from, {rank_, Buffer::kPartial, 0, first_of(owner) + begin, first_of(owner) + end}, {});
        if (options_.mapped) {
          copy(lane_of(owner), plan_.steps[at(product)].to, {owner, Buffer::kArrived, rank_, begin, end}, {product});
          signal(lane_of(owner), Flag::kArrived, owner, piece);
        } else {
          const int source = (rank_ + n_ - k) % n_;
          const auto [own_begin, own_end] = piece_of(rank_, piece);
          received.push_back(exchange(owner, plan_.steps[at(product)].to, source,
                                      {rank_, Buffer::kArrived, source, own_begin, own_end}, {product}));
        }
      }
    }
    return reduce(reduced, own, received);
  }

  void matmul_all_reduce() {
    const std::vector<int> reduced = matmul_reduce_scatter(Buffer::kReduced);
    if (n_ == 1) return;
    copy(own_lane(), {rank_, Buffer::kReduced, 0, 0, rows_of(rank_)}, output(first_of(rank_), rows_of(rank_)), {});
    for (int k = 1; k < n_; ++k) {
      const int peer = (rank_ + k) % n_;
      if (!options_.mapped) {
        exchange((rank_ + n_ - k) % n_, {rank_, Buffer::kReduced, 0, 0, rows_of(rank_)}, peer,
                 all_rows(Buffer::kOutput, peer), reduced);
        continue;
      }
      for (int piece = 0; piece < options_.num_pieces; ++piece) {
        const auto [begin, end] = piece_of(peer, piece);
        await(lane_of(peer), Flag::kReady, peer, piece);
        copy(lane_of(peer), {peer, Buffer::kReduced, 0, begin, end}, output(first_of(peer) + begin, end - begin), {});
      }
    }
  }

  Plan finish() {
    for (const Step& step : plan_.steps) {
      for (const int before : step.after) {
        Step& earlier = plan_.steps[at(before)];
        if (earlier.lane != step.lane) earlier.has_waiter = true;
      }
    }
    return std::move(plan_);
  }

 private:
  struct Range {
    std::int64_t begin, end;
  };
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }

  std::int64_t rows_of(int rank) const { return rows_[at(rank)]; }
  std::int64_t first_of(int rank) const { return first_[at(rank)]; }
  /// Within the rank's rows.
  Range piece_of(int rank, int piece) const {
    const auto cut = [&](int i) { return rows_of(rank) * i / options_.num_pieces; };
    return {cut(piece), cut(piece + 1)};
  }
  Place input(std::int64_t begin, std::int64_t count) const { return {rank_, Buffer::kInput, 0, begin, begin + count}; }
  Place output(std::int64_t begin, std::int64_t count) const {
    return {rank_, Buffer::kOutput, 0, begin, begin + count};
  }
  Place all_rows(Buffer buffer, int owner) const {
    return {rank_, buffer, 0, first_of(owner), first_of(owner) + rows_of(owner)};
  }

  int own_lane() const { return num_multiply_; }
  int lane_of(int peer) const { return num_multiply_ + (peer - rank_ + n_) % n_; }

  int add(Step step) {
    plan_.steps.push_back(std::move(step));
    return static_cast<int>(plan_.steps.size()) - 1;
  }
  int copy(int lane, Place from, Place to, std::vector<int> after) {
    return add({.kind = StepKind::kCopy, .lane = lane, .from = from, .to = to, .after = std::move(after)});
  }
  int multiply(int lane, Place from, Place to, std::vector<int> after) {
    return add({.kind = StepKind::kMultiply, .lane = lane, .from = from, .to = to, .after = std::move(after)});
  }
  int exchange(int peer, Place from, int source, Place to, std::vector<int> after) {
    return add({.kind = StepKind::kExchange,
                .lane = own_lane(),
                .from = from,
                .to = to,
                .peer = peer,
                .source = source,
                .after = std::move(after)});
  }
  void await(int lane, Flag flag, int peer, int piece) {
    add({.kind = StepKind::kAwait, .lane = lane, .peer = peer, .flag = flag, .piece = piece, .after = {}});
  }
  void signal(int lane, Flag flag, int peer, int piece) {
    add({.kind = StepKind::kSignal, .lane = lane, .peer = peer, .flag = flag, .piece = piece, .after = {}});
  }
  template <class Function>
  void for_each_peer(Function function) {
    for (int k = 1; k < n_; ++k) function((rank_ + k) % n_);
  }

  void share_input() {
    copy(own_lane(), input(0, rows_of(rank_)), {rank_, Buffer::kShard, 0, 0, rows_of(rank_)}, {});
    for_each_peer([&](int peer) { signal(own_lane(), Flag::kReady, peer, 0); });
  }
  std::vector<int> reduce(Buffer to, const std::vector<int>& own, const std::vector<int>& received) {
    const bool shared = to == Buffer::kReduced && options_.mapped;
    const int lane = own_lane();
    std::vector<int> steps;
    for (int piece = 0; piece < options_.num_pieces; ++piece) {
      if (options_.mapped) for_each_peer([&](int peer) { await(lane, Flag::kArrived, peer, piece); });
      const auto [begin, end] = piece_of(rank_, piece);
      std::vector<int> after = received;
      after.push_back(own[at(piece)]);
      steps.push_back(add({.kind = StepKind::kReduce,
                           .lane = lane,
                           .from = {rank_, Buffer::kArrived, 0, begin, end},
                           .to = {rank_, to, 0, begin, end},
                           .after = std::move(after)}));
      if (shared) for_each_peer([&](int peer) { signal(lane, Flag::kReady, peer, piece); });
    }
    return steps;
  }

  int rank_;
  int n_;
  std::vector<std::int64_t> rows_;
  PlanOptions options_;
  std::vector<std::int64_t> first_;
  int num_multiply_;
  Plan plan_;
};

}  // namespace

Plan make_plan(MatmulOp op, int rank, const std::vector<std::int64_t>& rows, const PlanOptions& options) {
  if (rows.empty() || rank < 0 || rank >= static_cast<int>(rows.size()) ||
      std::any_of(rows.begin(), rows.end(), [](std::int64_t count) { return count < 0; })) {
    throw std::invalid_argument("matmul plan: rank " + std::to_string(rank) + " of " + std::to_string(rows.size()) +
                                " ranks, each with a number of rows that is not negative");
  }
  if (options.num_pieces < 1 || options.num_pieces > kMaxPieces || options.num_lanes < 1) {
    throw std::invalid_argument("matmul plan: " + std::to_string(options.num_pieces) + " pieces on " +
                                std::to_string(options.num_lanes) + " lanes; it takes 1 to " +
                                std::to_string(kMaxPieces) + " pieces and at least one lane");
  }
  Planner planner(op, rank, rows, options);
  switch (op) {
    case MatmulOp::kAllGatherMatmul:
      planner.all_gather_matmul();
      break;
    case MatmulOp::kMatmulReduceScatter:
      planner.matmul_reduce_scatter(Buffer::kOutput);
      break;
    case MatmulOp::kMatmulAllReduce:
      planner.matmul_all_reduce();
      break;
  }
  return planner.finish();
}

}  // namespace pycomm::cuda
