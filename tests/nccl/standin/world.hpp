// What the ranks of the stand-in share, and what moves between them: a file that all map.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "standin.hpp"

namespace standin {

using namespace pycomm::nccl::abi;

constexpr int kMostRanks = 8;
constexpr int kMostSplits = 32;
constexpr int kMostWindows = 32;
constexpr std::size_t kPathBytes = 256;
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
  struct {
    std::atomic<int> arrived;
    char path[kMostRanks][kPathBytes];
  } windows[kMostWindows];
  Channel channels[2][kMostRanks][kMostRanks];  // [use][from][to]
};

}  // namespace standin

namespace pycomm::nccl::abi {

struct Comm {
  std::string path;
  standin::Shared* shared = nullptr;
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
  int num_windows = 0;

  void start(std::function<Result()> new_job) {
    job = std::move(new_job);
    polls = 0;
    state = kInProgress;
  }
};

}  // namespace pycomm::nccl::abi

namespace standin {

struct Transfer {
  bool is_send;
  char* data;
  std::size_t left;
  int peer;
  bool done = false;
};

/// Those of a channel in order, all others at once; false: aborted.
bool run(Comm& comm, Use use, std::vector<Transfer> transfers);
/// A rank's end of the communicator that has this file; its ``shared`` is nullptr if that cannot be mapped.
Comm* open_comm(const std::string& path, int rank, int size);

/// A new or existing file of this size, in memory; nullptr if that cannot be.
void* map_file(const std::string& path, std::size_t bytes);

std::size_t size_of(DataType type);
/// The reduction of `count` values of each input, not in rank order.
void reduce_values(char* output, const std::vector<const char*>& inputs, std::size_t count, DataType type, RedOp op);

}  // namespace standin
