// The host transport under a sanitizer: ranks are threads of one process, one mapping a segment (PYCOMM_ONE_MAPPING),
// so that ThreadSanitizer sees every access of every rank to the same addresses. All ranks draw one random program of
// collectives and messages from the seed and compare each result with what it must be; values are small whole numbers,
// so sums are exact.
//
//   transport_driver SEED NUM_RANKS NUM_CALLS      exit status 0: all right; 1: a wrong result; 66: a sanitizer's
//   report
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "host/communicator.hpp"

namespace {

using namespace pycomm;        // NOLINT: a test program
using namespace pycomm::host;  // NOLINT

constexpr double kTimeoutS = 120;  // a sanitizer on a busy machine is slow

float value(int rank, std::size_t i, int call) { return static_cast<float>((rank + 3 * i + 7 * call) % 11); }

/// One rank's tensor of a call, in symmetric or ordinary memory, with the value of (rank, i, call) everywhere.
class Tensor {
 public:
  Tensor(Communicator& comm, std::size_t count, bool symmetric) : count_(count) {
    if (symmetric) {
      buffer_ = comm.empty(std::max<std::size_t>(count, 1) * sizeof(float), kTimeoutS);
    } else {
      ordinary_.resize(count);
    }
  }
  float* data() { return buffer_ != nullptr ? reinterpret_cast<float*>(buffer_->data()) : ordinary_.data(); }
  void fill(int rank, int call) {
    for (std::size_t i = 0; i < count_; ++i) data()[i] = value(rank, i, call);
  }

 private:
  std::size_t count_;
  std::unique_ptr<SymmetricBuffer> buffer_;
  std::vector<float> ordinary_;
};

class Rank {
 public:
  Rank(Communicator& comm, unsigned seed) : comm_(comm), draw_(seed) {}

  void run(int num_calls) {
    for (int call = 0; call < num_calls; ++call) {
      // Drawn by all ranks alike: below, at and above the thresholds, one slice and several.
      const std::size_t counts[] = {1, 5, 300, 2000, 9000, 40'000, 100'001};
      const std::size_t count = counts[pick(7)];
      symmetric_ = pick(2) == 1;
      mixed_ = pick(4) == 0;
      options_ = {kTimeoutS, pick(2) == 1};
      switch (pick(9)) {
        case 0:
          all_reduce(count, call);
          break;
        case 1:
          broadcast(count, call);
          break;
        case 2:
          reduce_scatter(count, call);
          break;
        case 3:
          all_gather(count, call);
          break;
        case 4:
          all_to_all(count, call);
          break;
        case 5:
          ring(count, call);
          break;
        case 6:
          relay(count, call);
          break;
        case 7:
          scan(count, call);
          break;
        default:
          comm_.submit({.kind = OpKind::kBarrier}, {}, {kTimeoutS, false});
      }
    }
  }

 private:
  int pick(int n) { return static_cast<int>(draw_() % static_cast<unsigned>(n)); }
  int n() const { return comm_.world_size(); }
  int me() const { return comm_.rank(); }
  /// Allocation is collective, so in mixed calls every rank allocates and only even ones use it.
  std::unique_ptr<Tensor> tensor(std::size_t count) {
    auto result = std::make_unique<Tensor>(comm_, count, symmetric_);
    if (symmetric_ && mixed_ && me() % 2 == 1) result = std::make_unique<Tensor>(comm_, count, false);
    return result;
  }
  void finish(const std::shared_ptr<Work>& work) const {
    if (work != nullptr) work->wait(kTimeoutS, nullptr);
  }
  void expect(float got, float wanted, const char* what, int call) const {
    if (got == wanted) return;
    std::fprintf(stderr, "rank %d, call %d, %s: %g instead of %g\n", me(), call, what, static_cast<double>(got),
                 static_cast<double>(wanted));
    std::exit(1);
  }
  float sum(std::size_t i, int call) const { return sum(n(), i, call); }
  /// Of the first ranks.
  static float sum(int num_ranks, std::size_t i, int call) {
    float total = 0;
    for (int r = 0; r < num_ranks; ++r) total += value(r, i, call);
    return total;
  }
  void submit(OpKind kind, std::size_t count, Operands operands, int root = 0) {
    const Call call{.kind = kind, .dtype = DType::kFloat32, .root = root, .count = count};
    finish(comm_.submit(call, std::move(operands), options_));
  }

  void all_reduce(std::size_t count, int call) {
    const auto data = tensor(count);
    data->fill(me(), call);
    submit(OpKind::kAllReduce, count, {data->data(), data->data(), {}, {}});
    for (std::size_t i = 0; i < count; ++i) expect(data->data()[i], sum(i, call), "all_reduce", call);
    data->fill(-1, call);  // the caller may write at once
  }
  void scan(std::size_t count, int call) {
    const auto data = tensor(count);
    data->fill(me(), call);
    submit(OpKind::kScan, count, {data->data(), data->data(), {}, {}});
    for (std::size_t i = 0; i < count; ++i) expect(data->data()[i], sum(me() + 1, i, call), "scan", call);
    data->fill(-1, call);
  }
  void broadcast(std::size_t count, int call) {
    const int root = call % n();
    const auto data = tensor(count);
    data->fill(me(), call);
    submit(OpKind::kBroadcast, count, {data->data(), data->data(), {}, {}}, root);
    for (std::size_t i = 0; i < count; ++i) expect(data->data()[i], value(root, i, call), "broadcast", call);
    data->fill(-1, call);
  }
  void reduce_scatter(std::size_t count, int call) {
    const std::size_t total = count * static_cast<std::size_t>(n());
    const auto input = tensor(total);
    input->fill(me(), call);
    std::vector<float> output(count);
    submit(OpKind::kReduceScatter, total, {input->data(), output.data(), Parts::even(count, n()), {}});
    for (std::size_t i = 0; i < count; ++i) {
      expect(output[i], sum(static_cast<std::size_t>(me()) * count + i, call), "reduce_scatter", call);
    }
    input->fill(-1, call);
  }
  void all_gather(std::size_t count, int call) {
    const std::size_t total = count * static_cast<std::size_t>(n());
    const auto output = tensor(total);
    std::vector<float> input(count);
    for (std::size_t i = 0; i < count; ++i) input[i] = value(me(), i, call);
    submit(OpKind::kAllGather, total, {input.data(), output->data(), {}, Parts::even(count, n())});
    for (int r = 0; r < n(); ++r) {
      for (std::size_t i = 0; i < count; ++i) {
        expect(output->data()[static_cast<std::size_t>(r) * count + i], value(r, i, call), "all_gather", call);
      }
    }
    output->fill(-1, call);
  }
  void all_to_all(std::size_t count, int call) {
    const std::size_t total = count * static_cast<std::size_t>(n());
    const auto input = tensor(total);
    input->fill(me(), call);
    std::vector<float> output(total);
    const Parts parts = Parts::even(count, n());
    submit(OpKind::kAllToAll, total, {input->data(), output.data(), parts, parts});
    for (int r = 0; r < n(); ++r) {
      for (std::size_t i = 0; i < count; ++i) {
        expect(output[static_cast<std::size_t>(r) * count + i],
               value(r, static_cast<std::size_t>(me()) * count + i, call), "all_to_all", call);
      }
    }
    input->fill(-1, call);
  }
  void ring(std::size_t count, int call) {
    const int left = (me() + n() - 1) % n();
    const int right = (me() + 1) % n();
    const auto mine = tensor(count);
    mine->fill(me(), call);
    std::vector<float> theirs(count);
    const std::vector<MessageSpec> specs = {
        {.is_send = true, .peer = right, .tag = call, .data = mine->data(), .count = count, .dtype = DType::kFloat32},
        {.is_send = false, .peer = left, .tag = call, .data = theirs.data(), .count = count, .dtype = DType::kFloat32}};
    if (options_.async_op) {
      finish(comm_.start_messages(specs, options_.timeout_s));
    } else {
      comm_.run_messages(specs, options_.timeout_s);
    }
    for (std::size_t i = 0; i < count; ++i) expect(theirs[i], value(left, i, call), "ring", call);
    mine->fill(-1, call);
  }
  /// Once around the ranks, one blocking message after the other.
  void relay(std::size_t count, int call) {
    const int left = (me() + n() - 1) % n();
    const int right = (me() + 1) % n();
    const auto data = tensor(count);
    data->fill(0, call);
    const auto spec = [&](bool is_send, int peer) {
      return MessageSpec{.is_send = is_send,
                         .peer = peer,
                         .tag = call,
                         .data = data->data(),
                         .count = count,
                         .dtype = DType::kFloat32};
    };
    if (me() != 0) {
      data->fill(-1, call);
      comm_.recv(spec(false, left), options_.timeout_s);
    }
    if (right != 0) comm_.send(spec(true, right), options_.timeout_s);
    for (std::size_t i = 0; i < count; ++i) expect(data->data()[i], value(0, i, call), "relay", call);
    data->fill(-1, call);
  }

  Communicator& comm_;
  std::minstd_rand draw_;
  bool symmetric_ = false;
  bool mixed_ = false;
  CallOptions options_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: transport_driver SEED NUM_RANKS NUM_CALLS\n");
    return 2;
  }
  const auto seed = static_cast<unsigned>(std::atoi(argv[1]));
  const int num_ranks = std::atoi(argv[2]);
  const int num_calls = std::atoi(argv[3]);
  const Listener listener;
  // Messages of several slices, and of more than the caches are said to hold, shall be quick to try.
  const Tuning tuning = tuning_with(num_ranks, {{"slice_bytes", 64 * 1024}, {"cached_bytes", 200 * 1024}});
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < num_ranks; ++rank) {
    ranks.emplace_back([&, rank] {
      const Meeting meeting{.names = {}, .deadline = Deadline::after(kTimeoutS), .check = {}};
      auto members = meet(rank, num_ranks, rank == 0 ? &listener : nullptr, listener.address(), tuning, meeting);
      Communicator comm("world", std::move(members), 600, nullptr);
      Rank(comm, seed).run(num_calls);
      comm.submit({.kind = OpKind::kBarrier}, {}, {kTimeoutS, false});
      comm.close(kTimeoutS);
    });
  }
  for (std::thread& rank : ranks) rank.join();
  std::printf("%d calls on %d ranks right\n", num_calls, num_ranks);
  return 0;
}
