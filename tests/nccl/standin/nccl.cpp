// NCCL over a file that the ranks map.
//
// Rules kept: a call of a non-blocking communicator is on its stream only once ncclCommGetAsyncError no longer says "in
// progress", and a call before that is an error; the first collective waits on the host for all ranks; calls of a
// communicator run one after the other, whatever their streams; a send holds its stream until it is received; only what
// is in one group progresses together; nothing is compared, so calls that differ hang or mix up their data; a rank that
// dies or aborts is told to nobody; sums are not in rank order.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "standin.hpp"

using namespace pycomm::nccl::abi;

namespace {

constexpr int kMostRanks = 8;
constexpr int kMostSplits = 32;
constexpr std::size_t kChunk = 4096;
constexpr int kPollsInProgress = 3;

struct Channel {
  std::atomic<std::uint64_t> written;
  std::atomic<std::uint64_t> read;
  std::size_t size;
  char data[kChunk];
};

enum Use { kCollectives, kMessages };

struct Shared {
  std::atomic<int> attached;
  std::atomic<int> connected;
  struct {
    std::atomic<int> arrived;
    int color[kMostRanks];
    int key[kMostRanks];
  } splits[kMostSplits];
  Channel channels[2][kMostRanks][kMostRanks];  // [use][from][to]
};

std::atomic<int> injected_error = 0;
std::atomic<bool> hang = false;
std::atomic<int> num_aborts = 0;
std::atomic<int> last_max_ctas = 0;

Shared* map_file(const std::string& path) {
  const int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) return nullptr;
  void* const memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return memory == MAP_FAILED ? nullptr : static_cast<Shared*>(memory);
}

}  // namespace

namespace pycomm::nccl::abi {

struct Comm {
  std::string path;
  Shared* shared = nullptr;
  int rank = 0;
  int size = 0;
  std::atomic<bool> aborted = false;
  Result state = kSuccess;
  std::function<Result()> job;  // progresses when it is asked for
  int polls = 0;
  bool connected = false;
  std::uint64_t issued = 0;
  std::atomic<std::uint64_t> finished = 0;
  int num_splits = 0;

  void start(std::function<Result()> new_job) {
    job = std::move(new_job);
    polls = 0;
    state = kInProgress;
  }
};

}  // namespace pycomm::nccl::abi

namespace {

struct Transfer {
  bool is_send;
  char* data;
  std::size_t left;
  int peer;
  bool done = false;
};

/// Those of a channel in order, all others at once; false: aborted.
bool run(Comm& comm, Use use, std::vector<Transfer> transfers) {
  for (Transfer& t : transfers) t.done = !t.is_send && t.left == 0;
  int idle = 0;
  while (!std::all_of(transfers.begin(), transfers.end(), [](const Transfer& t) { return t.done; })) {
    if (comm.aborted) return false;
    bool moved = false;
    std::map<std::pair<int, bool>, bool> busy;
    for (Transfer& t : transfers) {
      if (t.done || std::exchange(busy[{t.peer, t.is_send}], true)) continue;
      auto& channels = comm.shared->channels[use];
      Channel& channel = t.is_send ? channels[comm.rank][t.peer] : channels[t.peer][comm.rank];
      const std::uint64_t written = channel.written.load(std::memory_order_acquire);
      const std::uint64_t read = channel.read.load(std::memory_order_acquire);
      if (t.is_send && written == read) {
        if (t.left == 0) {
          t.done = true;
        } else {
          channel.size = std::min(t.left, kChunk);
          std::memcpy(channel.data, t.data, channel.size);
          t.data += channel.size;
          t.left -= channel.size;
          channel.written.store(written + 1, std::memory_order_release);
        }
        moved = true;
      } else if (!t.is_send && written > read) {
        const std::size_t size = std::min(t.left, channel.size);
        std::memcpy(t.data, channel.data, size);
        t.data += size;
        t.left -= size;
        channel.read.store(read + 1, std::memory_order_release);
        t.done = t.left == 0;
        moved = true;
      }
    }
    idle = moved ? 0 : idle + 1;
    if (idle > 20) std::this_thread::sleep_for(std::chrono::microseconds(std::min(idle, 500)));
  }
  return true;
}

std::size_t size_of(DataType type) {
  switch (type) {
    case kInt8:
    case kUint8:
      return 1;
    case kFloat16:
    case kBfloat16:
      return 2;
    case kInt32:
    case kFloat32:
      return 4;
    default:
      return 8;
  }
}

struct Bfloat {
  std::uint16_t bits;
  explicit operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
  static Bfloat of(float value) {
    const auto wide = std::bit_cast<std::uint32_t>(value);
    return {static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
  }
};

template <class T, class Wide, class Narrow>
void reduce_as(char* output, const std::vector<const char*>& inputs, std::size_t count, RedOp op, Narrow narrow) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto value = [&](const char* input) { return static_cast<Wide>(reinterpret_cast<const T*>(input)[i]); };
    Wide total = value(inputs.back());
    for (std::size_t k = inputs.size() - 1; k-- > 0;) {
      const Wide next = value(inputs[k]);
      if (op == kSum || op == kAvg) total = static_cast<Wide>(total + next);
      if (op == kProd) total = static_cast<Wide>(total * next);
      if (op == kMax) total = std::max(total, next);
      if (op == kMin) total = std::min(total, next);
    }
    if (op == kAvg) total = static_cast<Wide>(total / static_cast<Wide>(inputs.size()));
    reinterpret_cast<T*>(output)[i] = narrow(total);
  }
}

template <class T, class Wide = T>
void reduce_plain(char* output, const std::vector<const char*>& inputs, std::size_t count, RedOp op) {
  reduce_as<T, Wide>(output, inputs, count, op, [](Wide value) { return static_cast<T>(value); });
}

void reduce_values(char* output, const std::vector<const char*>& inputs, std::size_t count, DataType type, RedOp op) {
  switch (type) {
    case kInt8:
      return reduce_plain<std::int8_t>(output, inputs, count, op);
    case kUint8:
      return reduce_plain<std::uint8_t>(output, inputs, count, op);
    case kInt32:
      return reduce_plain<std::int32_t>(output, inputs, count, op);
    case kInt64:
      return reduce_plain<std::int64_t>(output, inputs, count, op);
    case kFloat16:
      return reduce_plain<_Float16, float>(output, inputs, count, op);
    case kFloat32:
      return reduce_plain<float>(output, inputs, count, op);
    case kFloat64:
      return reduce_plain<double>(output, inputs, count, op);
    case kBfloat16:
      return reduce_as<Bfloat, float>(output, inputs, count, op, &Bfloat::of);
  }
}

char* bytes(const void* data) { return const_cast<char*>(static_cast<const char*>(data)); }

/// Everyone's `input`, on `only` (-1: everyone), each at its place in `all`.
bool gather(Comm& comm, const void* input, std::vector<char>& all, std::size_t size, int only) {
  all.resize(size * static_cast<std::size_t>(comm.size));
  std::vector<Transfer> transfers;
  for (int peer = 0; peer < comm.size; ++peer) {
    if (only < 0 || peer == only) transfers.push_back({true, bytes(input), size, peer});
    if (only < 0 || comm.rank == only) {
      transfers.push_back({false, all.data() + size * static_cast<std::size_t>(peer), size, peer});
    }
  }
  return run(comm, kCollectives, transfers);
}

std::vector<const char*> places(const std::vector<char>& all, std::size_t size, std::size_t offset, int num) {
  std::vector<const char*> found;
  for (int rank = 0; rank < num; ++rank) found.push_back(all.data() + size * static_cast<std::size_t>(rank) + offset);
  return found;
}

struct Task {
  Comm* comm;
  Stream stream;
  std::function<bool(Comm&)> kernel;  // a collective
  Transfer message = {};
};

thread_local int depth = 0;
thread_local std::vector<Task> group;

/// All of one communicator: one kernel.
Result launch(Comm* comm, const std::vector<Task>& tasks) {
  if (comm->state == kInProgress) return kInvalidUsage;
  const bool collective =
      std::any_of(tasks.begin(), tasks.end(), [](const Task& task) { return task.kernel != nullptr; });
  if (collective && !comm->connected) {
    comm->connected = true;
    ++comm->shared->connected;
  }
  comm->start([comm, tasks, collective] {
    if (collective && comm->shared->connected < comm->size) return kInProgress;
    tasks.front().stream->push([comm, tasks, number = comm->issued++] {
      while (comm->finished != number && !comm->aborted) std::this_thread::yield();
      while (hang && !comm->aborted) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      std::vector<Transfer> messages;
      for (const Task& task : tasks) {
        if (!task.kernel) messages.push_back(task.message);
        if (task.kernel && !task.kernel(*comm)) break;
      }
      run(*comm, kMessages, messages);
      comm->finished = number + 1;
    });
    return kSuccess;
  });
  return kInProgress;
}

Result add(Task task) {
  if (task.comm->state == kInProgress && depth == 0) return kInvalidUsage;
  if (depth == 0) return launch(task.comm, {std::move(task)});
  group.push_back(std::move(task));
  return kSuccess;
}

Result checked_config(const Config* config) {
  if (config == nullptr) return kSuccess;
  const bool good =
      config->magic == kMagic && config->size >= sizeof(Config) && config->version >= 21700 && config->blocking == 0;
  return good ? kSuccess : kInvalidArgument;
}

Result checked_budget(const CollConfig* config) {
  if (config->size < sizeof(CollConfig) || config->magic != kMagic) return kInvalidArgument;
  last_max_ctas = config->max_ctas;
  return kSuccess;
}

Comm* open_comm(const std::string& path, int rank, int size) {
  auto* const comm = new Comm();  // never freed: kernels of it may hang
  comm->path = path;
  comm->shared = map_file(path);
  comm->rank = rank;
  comm->size = size;
  if (comm->shared != nullptr) ++comm->shared->attached;
  return comm;
}

}  // namespace

extern "C" {

Result ncclGetVersion(int* version) {
  const char* const text = std::getenv("STANDIN_VERSION");
  *version = text == nullptr ? 23203 : std::atoi(text);
  return kSuccess;
}

Result ncclGetUniqueId(UniqueId* id) {
  static int count = 0;
  const char* const folder = std::getenv("STANDIN_FOLDER");
  const std::string path = std::string(folder == nullptr ? "/tmp" : folder) + "/id" + std::to_string(getpid()) + "-" +
                           std::to_string(count++);
  if (path.size() >= sizeof(id->internal)) return kSystemError;
  std::memset(id->internal, 0, sizeof(id->internal));
  std::memcpy(id->internal, path.data(), path.size());
  return kSuccess;
}

const char* ncclGetErrorString(Result result) {
  return result == kRemoteError ? "remote process exited or there was a network error" : "an error of the stand-in";
}
const char* ncclGetLastError(Comm*) { return ""; }

Result ncclCommInitRankConfig(Comm** comm, int size, UniqueId id, int rank, Config* config) {
  if (checked_config(config) != kSuccess || size > kMostRanks) return kInvalidArgument;
  Comm* const opened = *comm = open_comm(id.internal, rank, size);
  if (opened->shared == nullptr) return kSystemError;
  opened->start([opened] { return opened->shared->attached < opened->size ? kInProgress : kSuccess; });
  return kInProgress;
}

Result ncclCommSplit(Comm* comm, int color, int key, Comm** child, Config* config) {
  if (checked_config(config) != kSuccess || color < kNoColor) return kInvalidArgument;
  if (comm->state == kInProgress) return kInvalidUsage;
  const int number = comm->num_splits++;
  auto& meeting = comm->shared->splits[number];
  meeting.color[comm->rank] = color;
  meeting.key[comm->rank] = key;
  ++meeting.arrived;
  *child = nullptr;
  comm->start([=, &meeting] {
    if (meeting.arrived < comm->size) return kInProgress;
    if (color == kNoColor) return kSuccess;
    std::vector<std::pair<int, int>> members;
    for (int rank = 0; rank < comm->size; ++rank) {
      if (meeting.color[rank] == color) members.emplace_back(meeting.key[rank], rank);
    }
    std::sort(members.begin(), members.end());
    const auto place = std::find(members.begin(), members.end(), std::pair(key, comm->rank)) - members.begin();
    const std::string path = comm->path + "." + std::to_string(number) + "." + std::to_string(color);
    Comm* const opened = open_comm(path, static_cast<int>(place), static_cast<int>(members.size()));
    opened->start([opened] { return opened->shared->attached < opened->size ? kInProgress : kSuccess; });
    *child = opened;
    return kSuccess;
  });
  return kInProgress;
}

Result ncclCommGetAsyncError(Comm* comm, Result* result) {
  if (comm->job && ++comm->polls > kPollsInProgress) {
    comm->state = comm->job();
    if (comm->state != kInProgress) comm->job = nullptr;
  }
  *result = injected_error != 0 ? static_cast<Result>(injected_error.load()) : comm->state;
  return kSuccess;
}

Result ncclCommFinalize(Comm* comm) {
  comm->start([comm] { return comm->finished < comm->issued ? kInProgress : kSuccess; });
  return kInProgress;
}
Result ncclCommDestroy(Comm*) { return kSuccess; }
Result ncclCommAbort(Comm* comm) {
  comm->aborted = true;
  ++num_aborts;
  return kSuccess;
}

Result ncclGroupStart() {
  ++depth;
  return kSuccess;
}
Result ncclGroupEnd() {
  if (depth == 0) return kInvalidUsage;
  if (--depth > 0) return kSuccess;
  std::map<Comm*, std::vector<Task>> by_comm;
  for (Task& task : group) by_comm[task.comm].push_back(std::move(task));
  group.clear();
  Result result = kSuccess;
  for (const auto& [comm, tasks] : by_comm) {
    if (const Result launched = launch(comm, tasks); result == kSuccess) result = launched;
  }
  return result;
}

Result ncclAllReduce(const void* input, void* output, std::size_t count, DataType type, RedOp op, Comm* comm,
                     Stream stream) {
  return add({comm, stream, [=](Comm& c) {
                std::vector<char> all;
                const std::size_t size = count * size_of(type);
                if (!gather(c, input, all, size, -1)) return false;
                reduce_values(bytes(output), places(all, size, 0, c.size), count, type, op);
                return true;
              }});
}
Result ncclReduce(const void* input, void* output, std::size_t count, DataType type, RedOp op, int root, Comm* comm,
                  Stream stream) {
  return add({comm, stream, [=](Comm& c) {
                std::vector<char> all;
                const std::size_t size = count * size_of(type);
                if (!gather(c, input, all, size, root)) return false;
                if (c.rank == root) reduce_values(bytes(output), places(all, size, 0, c.size), count, type, op);
                return true;
              }});
}
Result ncclReduceScatter(const void* input, void* output, std::size_t count, DataType type, RedOp op, Comm* comm,
                         Stream stream) {
  return add({comm, stream, [=](Comm& c) {
                std::vector<char> all;
                const std::size_t size = count * size_of(type);
                const auto n = static_cast<std::size_t>(c.size);
                if (!gather(c, input, all, size * n, -1)) return false;
                const auto mine = places(all, size * n, size * static_cast<std::size_t>(c.rank), c.size);
                reduce_values(bytes(output), mine, count, type, op);
                return true;
              }});
}
Result ncclAllGather(const void* input, void* output, std::size_t count, DataType type, Comm* comm, Stream stream) {
  return add({comm, stream, [=](Comm& c) {
                std::vector<char> all;
                if (!gather(c, input, all, count * size_of(type), -1)) return false;
                std::memcpy(output, all.data(), all.size());
                return true;
              }});
}
Result ncclBroadcast(const void* input, void* output, std::size_t count, DataType type, int root, Comm* comm,
                     Stream stream) {
  return add({comm, stream, [=](Comm& c) {
                const std::size_t size = count * size_of(type);
                std::vector<char> copy(size);
                std::vector<Transfer> transfers{{false, copy.data(), size, root}};
                for (int peer = 0; peer < c.size && c.rank == root; ++peer) {
                  transfers.push_back({true, bytes(input), size, peer});
                }
                if (!run(c, kCollectives, transfers)) return false;
                std::memcpy(output, copy.data(), size);
                return true;
              }});
}
Result ncclSend(const void* data, std::size_t count, DataType type, int peer, Comm* comm, Stream stream) {
  return add({comm, stream, nullptr, {true, bytes(data), count * size_of(type), peer}});
}
Result ncclRecv(void* data, std::size_t count, DataType type, int peer, Comm* comm, Stream stream) {
  return add({comm, stream, nullptr, {false, bytes(data), count * size_of(type), peer}});
}

Result ncclAllReduceConfig(const void* input, void* output, std::size_t count, DataType type, RedOp op, Comm* comm,
                           Stream stream, const CollConfig* config) {
  const Result checked = checked_budget(config);
  return checked == kSuccess ? ncclAllReduce(input, output, count, type, op, comm, stream) : checked;
}
Result ncclReduceConfig(const void* input, void* output, std::size_t count, DataType type, RedOp op, int root,
                        Comm* comm, Stream stream, const CollConfig* config) {
  const Result checked = checked_budget(config);
  return checked == kSuccess ? ncclReduce(input, output, count, type, op, root, comm, stream) : checked;
}
Result ncclReduceScatterConfig(const void* input, void* output, std::size_t count, DataType type, RedOp op, Comm* comm,
                               Stream stream, const CollConfig* config) {
  const Result checked = checked_budget(config);
  return checked == kSuccess ? ncclReduceScatter(input, output, count, type, op, comm, stream) : checked;
}
Result ncclAllGatherConfig(const void* input, void* output, std::size_t count, DataType type, Comm* comm, Stream stream,
                           const CollConfig* config) {
  const Result checked = checked_budget(config);
  return checked == kSuccess ? ncclAllGather(input, output, count, type, comm, stream) : checked;
}
Result ncclBroadcastConfig(const void* input, void* output, std::size_t count, DataType type, int root, Comm* comm,
                           Stream stream, const CollConfig* config) {
  const Result checked = checked_budget(config);
  return checked == kSuccess ? ncclBroadcast(input, output, count, type, root, comm, stream) : checked;
}

// For tests.

/// What ncclCommGetAsyncError says from now on.
void standin_inject_error(int result) { injected_error = result; }
/// Kernels do not end while this is set.
void standin_hang(int on) { hang = on != 0; }
int standin_num_aborts() { return num_aborts; }
int standin_last_max_ctas() { return last_max_ctas; }
}
