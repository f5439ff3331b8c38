#include "host/segment.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <ctime>

#ifdef PYCOMM_ONE_MAPPING
#include <algorithm>
#include <mutex>
#include <vector>
#endif

#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

constexpr std::size_t kPage = 4096;  // reserve() and the layout only need a multiple of what the kernel checks
#ifndef MADV_POPULATE_WRITE
constexpr int MADV_POPULATE_WRITE = 23;  // Linux 5.14; older kernels answer EINVAL and the first touch maps the page
#endif

std::size_t page_bytes() {
  static const std::size_t bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return bytes > kPage ? bytes : kPage;
}

/// Holds back SIGXFSZ, which ends a process that exceeds its limit on the size of files: EFBIG says it, too.
class FileSizeSignalHeld {
 public:
  FileSizeSignalHeld() {
    ::sigemptyset(&signal_);
    ::sigaddset(&signal_, SIGXFSZ);
    ::pthread_sigmask(SIG_BLOCK, &signal_, &before_);
  }
  ~FileSizeSignalHeld() {
    const int error = errno;
    constexpr timespec kAtOnce{};
    if (error == EFBIG && ::sigismember(&before_, SIGXFSZ) == 0) ::sigtimedwait(&signal_, nullptr, &kAtOnce);
    ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    errno = error;
  }
  FileSizeSignalHeld(const FileSizeSignalHeld&) = delete;  // marks one scope
  FileSizeSignalHeld& operator=(const FileSizeSignalHeld&) = delete;

 private:
  sigset_t signal_;
  sigset_t before_;
};

int resize(int fd, std::size_t bytes) {
  const FileSizeSignalHeld held;
  return ::ftruncate(fd, static_cast<off_t>(bytes));
}

int take(int fd, std::size_t offset, std::size_t bytes) {
  const FileSizeSignalHeld held;
  int result = -1;
  do {
    result = ::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  return result;
}

std::byte* map_fd(int fd, std::size_t bytes) {
  void* const data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) throw_errno("mmap of " + std::to_string(bytes) + " bytes of shared memory");
  return static_cast<std::byte*>(data);
}

#ifdef PYCOMM_ONE_MAPPING
// For sanitizers, with ranks as threads of one process: all of them see a segment at one address. With a mapping each,
// accesses of different ranks to the same memory would look unrelated.
struct Mapping {
  ino_t inode;
  std::byte* data;
  std::size_t bytes;
  int users;
};
std::mutex mappings_mutex;
std::vector<Mapping> mappings;

std::byte* one_mapping(int fd, std::size_t bytes) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) throw_errno("fstat of a memfd");
  const std::lock_guard lock(mappings_mutex);
  for (Mapping& mapping : mappings) {
    if (mapping.inode != status.st_ino) continue;
    ++mapping.users;
    return mapping.data;
  }
  mappings.push_back({status.st_ino, map_fd(fd, bytes), bytes, 1});
  return mappings.back().data;
}

void drop_mapping(const std::byte* data) {
  const std::lock_guard lock(mappings_mutex);
  const auto found = std::find_if(mappings.begin(), mappings.end(), [&](const Mapping& m) { return m.data == data; });
  if (--found->users != 0) return;
  ::munmap(found->data, found->bytes);
  mappings.erase(found);
}
#endif

}  // namespace

std::size_t round_to_pages(std::size_t bytes) {
  const std::size_t page = page_bytes();
  return (bytes + page - 1) / page * page;
}

void UniqueFd::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Segment::Segment(UniqueFd fd, std::size_t bytes) : fd_(std::move(fd)), bytes_(bytes) { data_ = map(); }

Segment::~Segment() {
  if (data_ != nullptr) unmap();
}

std::byte* Segment::map() const {
#ifdef PYCOMM_ONE_MAPPING
  return one_mapping(fd_.get(), bytes_);
#else
  return map_fd(fd_.get(), bytes_);
#endif
}

void Segment::unmap() const {
#ifdef PYCOMM_ONE_MAPPING
  drop_mapping(data_);
#else
  ::munmap(data_, bytes_);
#endif
}

Segment Segment::create(const char* name, std::size_t bytes) {
  bytes = round_to_pages(bytes);
  UniqueFd fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) throw_errno("memfd_create");
  if (resize(fd.get(), bytes) != 0) {
    throw_errno("ftruncate of shared memory to " + std::to_string(bytes) + " bytes");
  }
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) throw_errno("sealing a memfd");
  return Segment(std::move(fd), bytes);
}

Segment Segment::attach(UniqueFd fd, std::size_t bytes) {
  bytes = round_to_pages(bytes);
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) throw_errno("fstat of a peer's memfd");
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (static_cast<std::size_t>(status.st_size) < bytes || seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    throw Error(ErrorKind::kGeneral, "a peer's shared memory has " + std::to_string(status.st_size) + " bytes, " +
                                         std::to_string(bytes) + " sealed ones were expected");
  }
  return Segment(std::move(fd), bytes);
}

void Segment::reserve(std::size_t offset, std::size_t bytes) {
  if (bytes == 0) return;
  if (take(fd_.get(), offset, bytes) != 0) throw_errno("taking " + std::to_string(bytes) + " bytes of shared memory");
  // Mapping the pages now spares a fault per page later. Only a matter of speed, so an old kernel's EINVAL is fine.
  ::madvise(data_ + offset, bytes, MADV_POPULATE_WRITE);
}

}  // namespace pycomm::host
