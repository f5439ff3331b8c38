#include "host/issue_order.hpp"

#include <sys/random.h>

#include <mutex>
#include <unordered_map>

#include "host/fork_guard.hpp"
#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

/// The rule is about a whole process, so this is one per process.
struct Book {
  std::mutex mutex;
  std::uint64_t generation = 0;
  std::uint64_t token = 0;
  std::unordered_map<std::uint64_t, std::uint32_t> issued;
};

Book& book() {
  static Book instance;
  return instance;
}

}  // namespace

void fill_random(void* data, std::size_t bytes) {
  if (::getrandom(data, bytes, 0) != static_cast<ssize_t>(bytes)) throw_errno("getrandom");
}

std::uint64_t process_token() {
  Book& mine = book();
  const std::lock_guard lock(mine.mutex);
  if (mine.token == 0 || mine.generation != fork_generation()) {
    fill_random(&mine.token, sizeof(mine.token));
    mine.generation = fork_generation();
    mine.issued.clear();
  }
  return mine.token;
}

std::vector<std::uint32_t> next_issue(const std::vector<std::uint64_t>& tokens) {
  Book& mine = book();
  const std::lock_guard lock(mine.mutex);
  std::vector<std::uint32_t> numbers;
  numbers.reserve(tokens.size());
  for (const std::uint64_t token : tokens) numbers.push_back(++mine.issued[token]);
  return numbers;
}

void forget_issue(const std::vector<std::uint64_t>& tokens) {
  Book& mine = book();
  const std::lock_guard lock(mine.mutex);
  for (const std::uint64_t token : tokens) --mine.issued[token];
}

}  // namespace pycomm::host
