// Every CUDA thread is a fiber of the calling thread; see cuda_on_cpu.hpp. A fiber gives way where CUDA threads meet or
// look at each other: at block barriers, shuffles and flags. Who goes on is drawn from the seed, which also makes some
// ranks slow, so that others run ahead of them as far as their waits allow.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

using cuda_on_cpu::Position;

namespace {

constexpr std::size_t kStackBytes = 128 << 10;
constexpr std::size_t kWarp = 32;
constexpr std::uint64_t kMostSwitches = 2'000'000'000;  // far above any test: a schedule that never ends

struct Fiber;

/// Threads that wait for each other: a block, or a warp of it.
struct Meeting {
  std::size_t size = 0;
  std::size_t arrived = 0;
  bool all_ok = true;
  std::uint64_t values[kWarp] = {};
  std::vector<Fiber*> waiting;
};

struct Block {
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<std::byte> shared;
};

struct Fiber {
  Position position;
  Block* block = nullptr;
  struct CUstream_st* stream = nullptr;
  bool started = false;
  bool ok = true;           // what the last meeting decided
  std::uint64_t value = 0;  // what it passed on
  jmp_buf where;
  std::byte* stack = nullptr;
};

struct Launch {
  cudaLaunchConfig_t config;
  std::function<void()> kernel;
  std::function<bool()> step;  // instead of a kernel
};

}  // namespace

struct CUstream_st {
  std::deque<Launch> queue;
  std::vector<std::unique_ptr<Block>> blocks;  // of the launch that runs
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::size_t num_running = 0;
  unsigned slowness = 0;  // of 64 turns, how many it misses
};

namespace {

struct Scheduler {
  std::vector<CUstream_st*> streams;
  std::vector<Fiber*> ready;
  std::vector<std::byte*> free_stacks;
  std::minstd_rand draw;
  std::uint64_t switches = 0;
  std::uint64_t clock_ns = 0;
  Fiber* current = nullptr;
  jmp_buf home;
  ucontext_t home_context;
};

Scheduler& scheduler() {
  static Scheduler one;
  return one;
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

std::byte* take_stack() {
  auto& free_stacks = scheduler().free_stacks;
  if (free_stacks.empty()) {
    void* const memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a fiber's stack");
    free_stacks.push_back(static_cast<std::byte*>(memory));
  }
  std::byte* const stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

void to_scheduler() {
  Fiber* const fiber = scheduler().current;
  if (_setjmp(fiber->where) == 0) _longjmp(scheduler().home, 1);
}

void give_way() {
  scheduler().ready.push_back(scheduler().current);
  to_scheduler();
}

void fiber_main() {
  Fiber* const fiber = scheduler().current;
  fiber->stream->queue.front().kernel();
  --fiber->stream->num_running;
  _longjmp(scheduler().home, 1);
}

/// The first entry makes the stack, later ones jump to where the fiber gave way: no system call then.
void resume(Fiber* fiber) {
  scheduler().current = fiber;
  if (_setjmp(scheduler().home) != 0) return;
  if (fiber->started) _longjmp(fiber->where, 1);
  fiber->started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber->stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

void start(CUstream_st* stream) {
  if (stream->queue.front().step) return;  // take_step() does it
  const cudaLaunchConfig_t& config = stream->queue.front().config;
  const unsigned threads = config.blockDim.x;
  for (unsigned b = 0; b < config.gridDim.x; ++b) {
    Block* const block = stream->blocks.emplace_back(std::make_unique<Block>()).get();
    block->all.size = threads;
    block->warps.resize((threads + kWarp - 1) / kWarp);
    block->shared.resize(config.dynamicSmemBytes);
    for (unsigned t = 0; t < threads; ++t) {
      block->warps[t / kWarp].size += 1;
      Fiber* const fiber = stream->fibers.emplace_back(std::make_unique<Fiber>()).get();
      fiber->position = {t, b, threads, config.gridDim.x};
      fiber->block = block;
      fiber->stream = stream;
      fiber->stack = take_stack();
      scheduler().ready.push_back(fiber);
    }
  }
  stream->num_running = stream->fibers.size();
}

void finish(CUstream_st* stream) {
  for (const auto& fiber : stream->fibers) scheduler().free_stacks.push_back(fiber->stack);
  stream->fibers.clear();
  stream->blocks.clear();
  stream->queue.pop_front();
  if (!stream->queue.empty()) start(stream);
}

/// One stream whose turn it is to take a step itself takes it, if it can. False: none can.
bool take_step() {
  Scheduler& s = scheduler();
  const std::size_t num = s.streams.size();
  const std::size_t first = num == 0 ? 0 : s.draw() % num;
  for (int patience = 0; patience < 2; ++patience) {
    for (std::size_t k = 0; k < num; ++k) {
      CUstream_st* const stream = s.streams[(first + k) % num];
      if (stream->num_running != 0 || stream->queue.empty() || !stream->queue.front().step) continue;
      if (patience == 0 && s.draw() % 64 < stream->slowness) continue;
      if (!stream->queue.front().step()) continue;
      finish(stream);
      return true;
    }
  }
  return false;
}

/// Any ready fiber; one of a slow stream usually loses its turn.
Fiber* draw_next() {
  Scheduler& s = scheduler();
  std::size_t at = 0;
  for (int tries = 0; tries < 8; ++tries) {
    at = s.draw() % s.ready.size();
    if (s.draw() % 64 >= s.ready[at]->stream->slowness) break;
  }
  Fiber* const fiber = s.ready[at];
  s.ready[at] = s.ready.back();
  s.ready.pop_back();
  return fiber;
}

/// The last one to arrive wakes the others.
void meet(Meeting& meeting) {
  Fiber* const self = scheduler().current;
  meeting.waiting.push_back(self);
  if (++meeting.arrived == meeting.size) {
    for (Fiber* fiber : meeting.waiting) {
      fiber->ok = meeting.all_ok;
      scheduler().ready.push_back(fiber);
    }
    meeting.waiting.clear();
    meeting.arrived = 0;
    meeting.all_ok = true;
  }
  to_scheduler();
}

}  // namespace

namespace cuda_on_cpu {

const Position& position() { return scheduler().current->position; }

cudaStream_t make_stream() {
  scheduler().streams.push_back(new CUstream_st);
  return scheduler().streams.back();
}

void free_stream(cudaStream_t stream) {
  std::erase(scheduler().streams, stream);
  delete stream;
}

void enqueue(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  config.stream->queue.push_back({config, std::move(kernel), nullptr});
}

void enqueue_step(cudaStream_t stream, std::function<bool()> step) {
  stream->queue.push_back({{}, nullptr, std::move(step)});
}

std::size_t num_queued() {
  std::size_t num = 0;
  for (const CUstream_st* stream : scheduler().streams) num += stream->queue.size();
  return num;
}

void run(std::uint32_t seed) {
  Scheduler& s = scheduler();
  s.draw.seed(seed);
  s.switches = 0;
  for (CUstream_st* stream : s.streams) {
    constexpr unsigned kSlowness[] = {0, 0, 56, 63};
    stream->slowness = kSlowness[s.draw() % 4];
    if (!stream->queue.empty()) start(stream);
  }
  while (true) {
    if (++s.switches > kMostSwitches) fail("the kernels do not end");
    if ((s.ready.empty() || s.draw() % 16 == 0) && take_step()) continue;
    if (s.ready.empty()) break;
    Fiber* const fiber = draw_next();
    CUstream_st* const stream = fiber->stream;
    resume(fiber);
    if (stream->num_running == 0) finish(stream);
  }
  for (const CUstream_st* stream : s.streams) {
    if (stream->num_running != 0) fail("threads wait for each other, and some of them have left");
  }
  s.current = nullptr;
}

void weaken(int) { fail("orderings are weakened in threads.cpp only: fibers never race"); }

// One OS thread, so any order will do; what matters is who else may run before.
void store_release(std::uint32_t* flag, std::uint32_t value, int) {
  give_way();
  *flag = value;
}
std::uint32_t load_acquire(std::uint32_t* flag, int) {
  give_way();
  return *flag;
}
void store_relaxed(std::uint32_t* flag, std::uint32_t value) { *flag = value; }
std::uint32_t load_relaxed(std::uint32_t* flag) { return *flag; }
std::uint32_t exchange_relaxed(std::uint32_t* flag, std::uint32_t value) { return std::exchange(*flag, value); }

bool sync_block(bool ok, int) {
  Meeting& meeting = scheduler().current->block->all;
  meeting.all_ok = meeting.all_ok && ok;
  meet(meeting);
  return scheduler().current->ok;
}

std::uint64_t now_ns() { return scheduler().clock_ns += 1000; }

void* shared_memory() { return scheduler().current->block->shared.data(); }

std::uint64_t shuffle_xor(std::uint64_t bits, int distance) {
  const unsigned thread = position().thread;
  Meeting& warp = scheduler().current->block->warps[thread / kWarp];
  warp.values[thread % kWarp] = bits;
  meet(warp);
  const std::uint64_t result = warp.values[(thread % kWarp) ^ static_cast<unsigned>(distance)];
  meet(warp);  // all have read before anybody writes again
  return result;
}

}  // namespace cuda_on_cpu
