#include "host/symmetric_segments.hpp"

#include <sys/sysinfo.h>

#include <algorithm>
#include <cstdio>

#include "host/exchange.hpp"
#include "host/group.hpp"
#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

constexpr std::size_t kMostFreed = 32;  // segments unmapped in one allocation; the rest waits for the next

[[noreturn]] void throw_out_of_memory(const std::vector<int>& errors, std::size_t bytes) {
  std::string text = "symmetric memory of " + std::to_string(bytes) + " bytes a rank:";
  for (std::size_t r = 0; r < errors.size(); ++r) {
    if (errors[r] != 0) text += " rank " + std::to_string(r) + " says \"" + std::strerror(errors[r]) + "\"";
  }
  throw Error(ErrorKind::kOutOfMemory, text + ". Nothing was allocated");
}

/// Bytes that can be had without swapping, as the kernel estimates it.
std::size_t available_bytes() {
  std::size_t kib = 0;
  if (std::FILE* const file = std::fopen("/proc/meminfo", "re"); file != nullptr) {
    char line[128];
    while (std::fgets(line, sizeof(line), file) != nullptr && std::sscanf(line, "MemAvailable: %zu kB", &kib) != 1) {
    }
    std::fclose(file);
  }
  return kib * 1024;
}

}  // namespace

/// What rank 0 decides and every rank does.
struct SymmetricSegments::Plan {
  std::uint64_t id = 0;
  std::uint64_t part_bytes = 0;
  std::int32_t is_new = 0;
  std::int32_t error = 0;  // errno: rank 0 could not create the segment
  std::uint64_t num_freed = 0;
  std::uint64_t freed[kMostFreed] = {};
};

SymmetricSegment::SymmetricSegment(std::uint64_t id, std::size_t part_bytes, Segment memory)
    : id_(id), part_bytes_(part_bytes), memory_(std::move(memory)) {}

std::size_t SymmetricSegment::bytes_for(std::size_t part_bytes, int world_size) {
  return round_to_pages(static_cast<std::size_t>(kMaxRanks) * kCacheLine) +
         static_cast<std::size_t>(world_size) * part_bytes;
}

std::byte* SymmetricSegment::part(int rank) const { return memory_.data() + bytes_for(part_bytes_, rank); }

void SymmetricSegment::set_released(int rank, bool released) {
  store_flag(*reinterpret_cast<std::uint32_t*>(memory_.data() + static_cast<std::size_t>(rank) * kCacheLine),
             std::uint32_t{released});
}

bool SymmetricSegment::released(int rank) const {
  return load_flag(*reinterpret_cast<const std::uint32_t*>(memory_.data() +
                                                           static_cast<std::size_t>(rank) * kCacheLine)) != 0;
}

SymmetricSegments::~SymmetricSegments() {
  if (!quarantined_) return;
  // Leaked on purpose: a peer that was stopped in a failed collective may wake up and write until it ends.
  for (auto& segment : segments_) new std::shared_ptr<SymmetricSegment>(std::move(segment));
}

std::shared_ptr<SymmetricSegment> SymmetricSegments::find(std::uint64_t id) const {
  const std::lock_guard lock(mutex_);
  for (const auto& segment : segments_) {
    if (segment->id() == id) return segment;
  }
  return nullptr;
}

std::shared_ptr<SymmetricSegment> SymmetricSegments::find_address(const void* data, std::size_t bytes) const {
  const auto* const begin = static_cast<const std::byte*>(data);
  const std::lock_guard lock(mutex_);
  for (const auto& segment : segments_) {
    const std::byte* const part = segment->part(members_.rank);
    if (begin >= part && begin + bytes <= part + segment->part_bytes()) return segment;
  }
  return nullptr;
}

Location SymmetricSegments::locate(const void* data, std::size_t bytes) const {
  const auto segment = find_address(data, bytes);
  if (segment == nullptr) return {};
  return {segment->id(),
          static_cast<std::uint64_t>(static_cast<const std::byte*>(data) - segment->part(members_.rank))};
}

std::byte* SymmetricSegments::address(const Location& location, int rank) const {
  const auto segment = find(location.segment());
  if (segment == nullptr || location.offset() > segment->part_bytes()) {
    throw Error(ErrorKind::kGeneral, "rank " + std::to_string(rank) + " names symmetric segment " +
                                         std::to_string(location.segment()) + ", which is not mapped here");
  }
  return segment->part(rank) + location.offset();
}

std::unique_ptr<SymmetricBuffer> SymmetricSegments::peer(const void* data, std::size_t bytes, int rank) const {
  auto segment = find_address(data, bytes);
  if (segment == nullptr) {
    throw std::invalid_argument("not symmetric memory of this communicator: allocate it with comm.empty()");
  }
  const auto offset = static_cast<std::size_t>(static_cast<const std::byte*>(data) - segment->part(members_.rank));
  auto buffer = std::make_unique<SymmetricBuffer>(std::move(segment), rank, bytes, false);
  buffer->set_offset(offset);
  return buffer;
}

SymmetricSegments::Plan SymmetricSegments::plan(std::size_t part_bytes) {
  const auto free = [&](const SymmetricSegment& segment) {
    for (int r = 0; r < members_.world_size; ++r) {
      if (!segment.released(r)) return false;
    }
    return true;
  };
  Plan plan{.id = next_id_, .part_bytes = part_bytes, .is_new = 1};
  while (find(plan.id) != nullptr) plan.id = plan.id % (Location::kMaxSegments - 1) + 1;
  for (const auto& segment : segments_) {
    if (!free(*segment)) continue;
    const bool fits = segment->part_bytes() >= part_bytes && segment->part_bytes() <= 2 * part_bytes;
    if (fits && plan.is_new != 0) {
      plan.id = segment->id();
      plan.part_bytes = segment->part_bytes();
      plan.is_new = 0;
    } else if (plan.num_freed < kMostFreed) {
      plan.freed[plan.num_freed++] = segment->id();
    }
  }
  return plan;
}

std::unique_ptr<SymmetricBuffer> SymmetricSegments::allocate(Group& group, std::size_t bytes) {
  const std::size_t part_bytes = round_to_pages(std::max<std::size_t>(bytes, 1));
  {
    const Entry entry(group, Call{.kind = OpKind::kAllocate, .count = bytes});
  }

  Plan mine;
  std::shared_ptr<SymmetricSegment> segment;
  if (group.rank() == 0) {
    mine = plan(part_bytes);
    if (mine.is_new != 0) {
      const std::size_t total = SymmetricSegment::bytes_for(part_bytes, group.world_size());
      if (part_bytes > Location::kMaxOffset || total > available_bytes()) {
        mine.error = ENOMEM;
      } else {
        segment = std::make_shared<SymmetricSegment>(mine.id, part_bytes, Segment::create("pycomm-symmetric", total));
        for (int r = 1; r < group.world_size(); ++r) send_fd(members_.sockets[r], segment->memory().fd(), mine.id);
      }
    }
  }
  const Plan plan = exchange(group, mine)[0];
  if (plan.error != 0) throw_out_of_memory({plan.error}, bytes);

  {
    const std::lock_guard lock(mutex_);
    std::erase_if(segments_, [&](const auto& old) {
      return std::find(plan.freed, plan.freed + plan.num_freed, old->id()) != plan.freed + plan.num_freed;
    });
  }
  int error = 0;
  if (plan.is_new != 0) {
    next_id_ = plan.id % (Location::kMaxSegments - 1) + 1;  // ids come round again after 16 million allocations
    const std::size_t total = SymmetricSegment::bytes_for(plan.part_bytes, group.world_size());
    if (segment == nullptr) {
      UniqueFd fd = recv_fd(members_.sockets[0], 0, plan.id, group.deadline(), group.interrupt());
      segment = std::make_shared<SymmetricSegment>(plan.id, plan.part_bytes, Segment::attach(std::move(fd), total));
    }
    error = segment->memory().reserve(static_cast<std::size_t>(segment->part(group.rank()) - segment->memory().data()),
                                      plan.part_bytes);
    segment->memory().close_fd();
  } else {
    segment = find(plan.id);
    segment->set_released(group.rank(), false);
  }
  const std::vector<int> errors = exchange(group, error);
  if (std::any_of(errors.begin(), errors.end(), [](int e) { return e != 0; })) throw_out_of_memory(errors, bytes);
  if (plan.is_new != 0) {
    const std::lock_guard lock(mutex_);
    segments_.push_back(segment);
  }
  return std::make_unique<SymmetricBuffer>(std::move(segment), group.rank(), bytes, true);
}

}  // namespace pycomm::host
