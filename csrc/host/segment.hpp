// Anonymous shared memory: a memfd without a name in any file system, so that nothing is left behind however its owners
// die; handed to other processes as a descriptor.
#pragma once

#include <cstddef>
#include <utility>

namespace pycomm::host {

/// An owned file descriptor. Move-only.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;  // one owner closes it
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset();

 private:
  int fd_ = -1;
};

/// A mapped memfd. Move-only; the destructor unmaps.
class Segment {
 public:
  Segment() = default;
  /// Create `bytes` (rounded up to pages) of zeros, sealed against shrinking and growing. No memory is taken yet. What
  /// the system refuses is an Error with its code, here and below.
  static Segment create(const char* name, std::size_t bytes);
  /// Map a descriptor that another rank created. Throws if it is smaller than `bytes`.
  static Segment attach(UniqueFd fd, std::size_t bytes);

  Segment(Segment&& other) noexcept { *this = std::move(other); }
  Segment& operator=(Segment&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Segment(const Segment&) = delete;  // one owner unmaps it
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  int fd() const { return fd_.get(); }
  /// The mapping stays, the descriptor goes: once every rank maps the segment nobody needs it.
  void close_fd() { fd_.reset(); }

  /// Take the memory of [offset, offset + bytes) now, on this thread's NUMA node, and map its pages. An Error is better
  /// news than a SIGBUS in the middle of a training run.
  void reserve(std::size_t offset, std::size_t bytes);

 private:
  Segment(UniqueFd fd, std::size_t bytes);
  std::byte* map() const;
  void unmap() const;

  UniqueFd fd_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

std::size_t round_to_pages(std::size_t bytes);

}  // namespace pycomm::host
