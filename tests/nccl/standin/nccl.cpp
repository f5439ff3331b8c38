// NCCL over a file that the ranks map.
//
// Rules kept: a call of a non-blocking communicator is on its stream only once ncclCommGetAsyncError no longer says "in
// progress", and a call before that is an error; the first collective waits on the host for all ranks; calls of a
// communicator run one after the other, whatever their streams; a send holds its stream until it is received; only what
// is in one group progresses together; nothing is compared, so calls that differ hang or mix up their data; a rank that
// dies or aborts is told to nobody; sums are not in rank order.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "world.hpp"

using namespace standin;

namespace {

std::atomic<int> injected_error = 0;
std::atomic<bool> hang = false;
std::atomic<int> num_aborts = 0;
std::atomic<int> last_max_ctas = 0;

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
