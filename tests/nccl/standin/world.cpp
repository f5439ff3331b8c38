#include "world.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <utility>

namespace standin {

void* map_file(const std::string& path, std::size_t bytes) {
  const int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return nullptr;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return memory == MAP_FAILED ? nullptr : memory;
}

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

Comm* open_comm(const std::string& path, int rank, int size) {
  auto* const comm = new Comm();  // never freed: kernels of it may hang
  comm->path = path;
  comm->shared = static_cast<Shared*>(map_file(path, sizeof(Shared)));
  comm->rank = rank;
  comm->size = size;
  if (comm->shared != nullptr) ++comm->shared->attached;
  return comm;
}

}  // namespace standin
