#include "host/symmetric_segments.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "host/agree.hpp"
#include "host/group.hpp"
#include "host/memory_limits.hpp"
#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

constexpr std::size_t kMostFreed = 32;  // segments unmapped in one allocation; the rest waits for the next
constexpr std::size_t kMostLimits = 8;  // of one rank; the tightest count

[[noreturn]] void throw_out_of_memory(const std::string& reasons, std::size_t bytes) {
  throw Error(ErrorKind::kOutOfMemory,
              "symmetric memory of " + std::to_string(bytes) + " bytes a rank: " + reasons + ". Nothing was allocated");
}

/// A rank's limits, for all to see.
struct Limits {
  std::uint64_t num = 0;
  MemoryLimit of[kMostLimits] = {};

  static Limits here() {
    std::vector<MemoryLimit> all = memory_limits();
    std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.left < b.left; });
    Limits limits{.num = std::min(all.size(), kMostLimits)};
    std::copy_n(all.begin(), limits.num, limits.of);
    return limits;
  }
  const MemoryLimit* begin() const { return of; }
  const MemoryLimit* end() const { return of + num; }
};

/// Which ranks have too little left for a part each; ranks that share a limit share what is left. Empty: none.
std::string too_little(const std::vector<Limits>& ranks, std::size_t part_bytes) {
  const auto has = [](const Limits& limits, std::uint64_t id) {
    return std::any_of(limits.begin(), limits.end(), [&](const MemoryLimit& limit) { return limit.id == id; });
  };
  std::string reasons;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    for (const MemoryLimit& limit : ranks[r]) {
      const auto num_sharing =
          std::count_if(ranks.begin(), ranks.end(), [&](const Limits& other) { return has(other, limit.id); });
      const std::size_t needed = part_bytes * static_cast<std::size_t>(num_sharing);
      if (needed <= limit.left) continue;
      reasons += (reasons.empty() ? "rank " : "; rank ") + std::to_string(r) + ": " +
                 (limit.id == MemoryLimit::kHost ? "its host" : "the limit of its memory cgroup") + " leaves " +
                 std::to_string(limit.left) + " bytes, and its ranks need " + std::to_string(needed);
      break;
    }
  }
  return reasons;
}

}  // namespace

/// Why a rank cannot have its memory; empty: it can.
struct SymmetricSegments::Refusal {
  char text[248] = {};

  bool is_set() const { return text[0] != 0; }
  void set(const std::string& reason) { reason.copy(text, sizeof(text) - 1); }
  /// What the system refuses in `step` is a reason.
  template <class Step>
  void attempt(const Step& step) {
    try {
      step();
    } catch (const Error& error) {
      if (error.code == 0) throw;
      set(error.what());
    } catch (const std::bad_alloc&) {
      set(std::strerror(ENOMEM));
    }
  }
};

/// What rank 0 decides and every rank does.
struct SymmetricSegments::Plan {
  std::uint64_t id = 0;
  std::uint64_t part_bytes = 0;
  std::int32_t is_new = 0;
  std::int32_t num_sent = 0;  // descriptors: to the ranks from 1 on
  Refusal refusal;            // of rank 0, or by the limits of any
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

/// On rank 0: make what was planned, unless a rank has too little memory, and hand it out.
std::shared_ptr<SymmetricSegment> SymmetricSegments::create(Plan& plan, const std::string& obstacle) const {
  std::shared_ptr<SymmetricSegment> segment;
  if (plan.is_new == 0) return segment;
  if (!obstacle.empty()) {
    plan.refusal.set(obstacle);
    return segment;
  }
  plan.refusal.attempt([&] {
    const std::size_t total = SymmetricSegment::bytes_for(plan.part_bytes, members_.world_size);
    segment = std::make_shared<SymmetricSegment>(plan.id, plan.part_bytes, Segment::create("pycomm-symmetric", total));
    for (int r = 1; r < members_.world_size; ++r) {
      send_fd(members_.sockets[static_cast<std::size_t>(r)], segment->memory().fd(), plan.id);
      plan.num_sent = r;
    }
  });
  if (plan.refusal.is_set()) plan.refusal.set("rank 0: " + std::string(plan.refusal.text));
  return segment;
}

UniqueFd SymmetricSegments::receive(Group& group, const Plan& plan) const {
  const Call call{.kind = OpKind::kAllocate, .count = plan.part_bytes};
  return recv_fd(members_.sockets[0], 0, plan.id, group.meeting("passing memory", call));
}

/// On every rank: map what rank 0 has made, and take this rank's part of it.
std::shared_ptr<SymmetricSegment> SymmetricSegments::join(Group& group, const Plan& plan,
                                                          std::shared_ptr<SymmetricSegment> segment) const {
  if (segment == nullptr) {
    UniqueFd fd = receive(group, plan);
    const std::size_t total = SymmetricSegment::bytes_for(plan.part_bytes, members_.world_size);
    segment = std::make_shared<SymmetricSegment>(plan.id, plan.part_bytes, Segment::attach(std::move(fd), total));
  }
  Segment& memory = segment->memory();
  memory.reserve(static_cast<std::size_t>(segment->part(members_.rank) - memory.data()), plan.part_bytes);
  memory.close_fd();
  return segment;
}

void SymmetricSegments::drop_freed(const Plan& plan) {
  const std::lock_guard lock(mutex_);
  std::erase_if(segments_, [&](const auto& old) {
    return std::find(plan.freed, plan.freed + plan.num_freed, old->id()) != plan.freed + plan.num_freed;
  });
}

// Every step that a rank's system may refuse is followed by an exchange, so that all ranks end it in the same way.
std::unique_ptr<SymmetricBuffer> SymmetricSegments::allocate(Group& group, std::size_t bytes) {
  const std::size_t part_bytes = round_to_pages(std::max<std::size_t>(bytes, 1));
  const std::vector<Limits> limits = agree(group, Call{.kind = OpKind::kAllocate, .count = bytes}, Limits::here());

  Plan mine;
  std::shared_ptr<SymmetricSegment> segment;
  if (group.rank() == 0) {
    mine = plan(part_bytes);
    const bool fits = part_bytes <= Location::kMaxOffset;
    segment = create(mine, fits ? too_little(limits, part_bytes) : "no rank can have more than 1 TiB at once");
  }
  const Plan plan = agree(group, mine)[0];
  drop_freed(plan);
  if (plan.refusal.is_set()) {
    Refusal late;  // of a descriptor that was on its way
    if (group.rank() != 0 && group.rank() <= plan.num_sent) {
      late.attempt([&] { receive(group, plan); });
    }
    throw_out_of_memory(plan.refusal.text, bytes);
  }

  Refusal refusal;
  if (plan.is_new != 0) {
    next_id_ = plan.id % (Location::kMaxSegments - 1) + 1;  // ids come round again after 16 million allocations
    refusal.attempt([&] { segment = join(group, plan, std::move(segment)); });
  } else {
    segment = find(plan.id);
    segment->set_released(group.rank(), false);
  }
  std::string reasons;
  const std::vector<Refusal> refusals = agree(group, refusal);
  for (std::size_t r = 0; r < refusals.size(); ++r) {
    if (!refusals[r].is_set()) continue;
    reasons += (reasons.empty() ? "rank " : "; rank ") + std::to_string(r) + ": " + refusals[r].text;
  }
  if (!reasons.empty()) throw_out_of_memory(reasons, bytes);
  if (plan.is_new != 0) {
    const std::lock_guard lock(mutex_);
    segments_.push_back(segment);
  }
  return std::make_unique<SymmetricBuffer>(std::move(segment), group.rank(), bytes, true);
}

}  // namespace pycomm::host
