// The symmetric memory of a communicator: segments that every rank maps, one part a rank.
//
//   segment:  header page (released[rank] flags) | part of rank 0 | part of rank 1 | …
//
// One memfd and one mapping per allocation; a peer's part is found by arithmetic. A segment is reused or unmapped only
// when every rank has released its part, which rank 0 looks at in the next allocation and tells all; until then its
// memory stays. So a peer can never write into memory that means something else by now.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host/bootstrap.hpp"
#include "host/fork_guard.hpp"
#include "pycomm/call.hpp"

namespace pycomm::host {

class Group;

class SymmetricSegment {
 public:
  SymmetricSegment(std::uint64_t id, std::size_t part_bytes, Segment memory);
  static std::size_t bytes_for(std::size_t part_bytes, int world_size);

  std::uint64_t id() const { return id_; }
  std::size_t part_bytes() const { return part_bytes_; }
  Segment& memory() { return memory_; }
  std::byte* part(int rank) const;
  /// This rank needs its part no more (1) or takes it up again (0).
  void set_released(int rank, bool released);
  bool released(int rank) const;

 private:
  std::uint64_t id_;
  std::size_t part_bytes_;
  Segment memory_;
};

/// This rank's part of an allocation, `bytes` long, as one owner holds it; the destructor releases it, locally.
class SymmetricBuffer {
 public:
  SymmetricBuffer(std::shared_ptr<SymmetricSegment> segment, int rank, std::size_t bytes, bool owner)
      : segment_(std::move(segment)), rank_(rank), bytes_(bytes), owner_(owner), generation_(fork_generation()) {}
  SymmetricBuffer(const SymmetricBuffer&) = delete;  // one owner releases it
  SymmetricBuffer& operator=(const SymmetricBuffer&) = delete;
  ~SymmetricBuffer() {
    // In a forked child the flags are the parent's, who still uses its copy.
    if (owner_ && generation_ == fork_generation()) segment_->set_released(rank_, true);
  }

  std::byte* data() const { return segment_->part(rank_) + offset_; }
  std::size_t bytes() const { return bytes_; }
  void set_offset(std::size_t offset) { offset_ = offset; }

 private:
  std::shared_ptr<SymmetricSegment> segment_;
  int rank_;
  std::size_t bytes_;
  std::size_t offset_ = 0;
  bool owner_;  // false: a look at a peer's part
  std::uint64_t generation_;
};

class SymmetricSegments {
 public:
  explicit SymmetricSegments(const Membership& members) : members_(members) {}
  ~SymmetricSegments();
  SymmetricSegments(const SymmetricSegments&) = delete;
  SymmetricSegments& operator=(const SymmetricSegments&) = delete;

  /// Collective, inside Group::run. Throws kOutOfMemory, on every rank alike, when one cannot have its memory: for lack
  /// of memory, by a limit of its process or cgroup, or for lack of descriptors. The group stays usable.
  std::unique_ptr<SymmetricBuffer> allocate(Group& group, std::size_t bytes);

  /// Where [data, data + bytes) lies in this rank's part of a segment, or an ordinary location.
  Location locate(const void* data, std::size_t bytes) const;
  std::byte* address(const Location& location, int rank) const;
  /// `rank`'s counterpart of [data, data + bytes) here. Throws std::invalid_argument if that is not symmetric.
  std::unique_ptr<SymmetricBuffer> peer(const void* data, std::size_t bytes, int rank) const;
  /// From now on nothing is unmapped until the process ends.
  void quarantine() { quarantined_ = true; }

 private:
  struct Plan;
  struct Refusal;

  Plan plan(std::size_t part_bytes);
  std::shared_ptr<SymmetricSegment> create(Plan& plan, const std::string& obstacle) const;
  UniqueFd receive(Group& group, const Plan& plan) const;
  std::shared_ptr<SymmetricSegment> join(Group& group, const Plan& plan,
                                         std::shared_ptr<SymmetricSegment> segment) const;
  void drop_freed(const Plan& plan);
  std::shared_ptr<SymmetricSegment> find(std::uint64_t id) const;
  std::shared_ptr<SymmetricSegment> find_address(const void* data, std::size_t bytes) const;

  const Membership& members_;
  mutable std::mutex mutex_;  // locate() may run on another thread than a collective
  std::vector<std::shared_ptr<SymmetricSegment>> segments_;
  std::uint64_t next_id_ = 1;
  bool quarantined_ = false;
};

}  // namespace pycomm::host
