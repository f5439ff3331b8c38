// Every CUDA thread is an OS thread; see cuda_on_cpu.hpp. For sanitizers: ThreadSanitizer sees the accesses of all
// ranks and the orderings that the kernels ask for, and nothing else orders one rank's threads with another's.
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

using cuda_on_cpu::Position;

namespace {

constexpr unsigned kWarp = 32;

/// Threads that wait for each other: a block, or a warp of it.
class Meeting {
 public:
  explicit Meeting(unsigned size) : size_(size) {}

  bool meet(bool ok) {
    std::unique_lock lock(mutex_);
    all_ok_ = all_ok_ && ok;
    const unsigned round = round_;
    if (++arrived_ == size_) {
      decided_ = all_ok_;
      all_ok_ = true;
      arrived_ = 0;
      ++round_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return round_ != round; });
    }
    return decided_;  // nobody decides anew before this thread is back
  }

 private:
  const unsigned size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned arrived_ = 0;
  unsigned round_ = 0;
  bool all_ok_ = true;
  bool decided_ = true;
};

struct Warp {
  explicit Warp(unsigned size) : all(size) {}
  Meeting all;
  std::uint64_t values[kWarp] = {};
};

struct Block {
  Block(unsigned threads, std::size_t shared_bytes) : all(threads), shared(shared_bytes) {
    for (unsigned first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Warp>(threads - first < kWarp ? threads - first : kWarp));
    }
  }
  Meeting all;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::byte> shared;
};

struct Launch {
  cudaLaunchConfig_t config;
  std::function<void()> kernel;
};

thread_local Position t_position;
thread_local Block* t_block = nullptr;
std::atomic<int> weakened_ordering{-1};

bool is_weakened(int ordering) { return weakened_ordering.load(std::memory_order_relaxed) == ordering; }

void run_kernel(const Launch& launch) {
  const unsigned num_threads = launch.config.blockDim.x;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::thread> threads;
  for (unsigned b = 0; b < launch.config.gridDim.x; ++b) {
    Block* const block =
        blocks.emplace_back(std::make_unique<Block>(num_threads, launch.config.dynamicSmemBytes)).get();
    for (unsigned t = 0; t < num_threads; ++t) {
      threads.emplace_back([&launch, block, b, t, num_threads] {
        t_position = {t, b, num_threads, launch.config.gridDim.x};
        t_block = block;
        launch.kernel();
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

struct CUstream_st {
  std::deque<Launch> queue;
};

namespace {

std::vector<CUstream_st*>& streams() {
  static std::vector<CUstream_st*> all;
  return all;
}

}  // namespace

namespace cuda_on_cpu {

const Position& position() { return t_position; }

cudaStream_t make_stream() { return streams().emplace_back(new CUstream_st); }

void free_stream(cudaStream_t stream) {
  std::erase(streams(), stream);
  delete stream;
}

void enqueue(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  config.stream->queue.push_back({config, std::move(kernel)});
}

void run(std::uint32_t) {
  std::vector<std::thread> threads;
  for (CUstream_st* stream : streams()) {
    threads.emplace_back([stream] {
      for (; !stream->queue.empty(); stream->queue.pop_front()) run_kernel(stream->queue.front());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void weaken(int ordering) { weakened_ordering.store(ordering, std::memory_order_relaxed); }

void store_release(std::uint32_t* flag, std::uint32_t value, int ordering) {
  const std::atomic_ref<std::uint32_t> reference(*flag);
  if (is_weakened(ordering)) {
    reference.store(value, std::memory_order_relaxed);
  } else {
    reference.store(value, std::memory_order_release);
  }
}

std::uint32_t load_acquire(std::uint32_t* flag, int ordering) {
  const std::atomic_ref<std::uint32_t> reference(*flag);
  sched_yield();  // there are more threads than cores
  return is_weakened(ordering) ? reference.load(std::memory_order_relaxed) : reference.load(std::memory_order_acquire);
}

void store_relaxed(std::uint32_t* flag, std::uint32_t value) {
  std::atomic_ref(*flag).store(value, std::memory_order_relaxed);
}
std::uint32_t load_relaxed(std::uint32_t* flag) { return std::atomic_ref(*flag).load(std::memory_order_relaxed); }
std::uint32_t exchange_relaxed(std::uint32_t* flag, std::uint32_t value) {
  return std::atomic_ref(*flag).exchange(value, std::memory_order_relaxed);
}

bool sync_block(bool ok, int ordering) {
  if (ordering >= 0 && is_weakened(ordering)) return ok;
  return t_block->all.meet(ok);
}

std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

void* shared_memory() { return t_block->shared.data(); }

std::uint64_t shuffle_xor(std::uint64_t bits, int distance) {
  const unsigned thread = t_position.thread;
  Warp& warp = *t_block->warps[thread / kWarp];
  warp.values[thread % kWarp] = bits;
  warp.all.meet(true);
  const std::uint64_t result = warp.values[(thread % kWarp) ^ static_cast<unsigned>(distance)];
  warp.all.meet(true);  // all have read before anybody writes again
  return result;
}

}  // namespace cuda_on_cpu
