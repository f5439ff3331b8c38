#include "host/fork_guard.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

std::atomic<std::uint64_t> generation{0};

struct Registry {
  std::mutex mutex;
  std::vector<const ForkGuard*> guards;
};

Registry& registry() {
  // Never destroyed: objects may outlive static destruction. The lock is held across fork(), so that the child finds
  // the list whole.
  static Registry* const instance = [] {
    auto* const created = new Registry;
    const int error = ::pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                                       [] {
                                         generation.fetch_add(1);
                                         for (const ForkGuard* const guard : registry().guards) guard->run();
                                         registry().mutex.unlock();
                                       });
    if (error != 0) {
      errno = error;
      throw_errno("pthread_atfork");
    }
    return created;
  }();
  return *instance;
}

}  // namespace

std::uint64_t fork_generation() { return generation.load(); }

ForkGuard::ForkGuard(std::function<void()> in_child) : in_child_(std::move(in_child)) {
  const std::lock_guard lock(registry().mutex);
  registry().guards.push_back(this);
}

ForkGuard::~ForkGuard() {
  const std::lock_guard lock(registry().mutex);
  std::erase(registry().guards, this);
}

}  // namespace pycomm::host
