// The files are those of proc(5) and of the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
// What cannot be read sets no limit.
#include "host/memory_limits.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>

namespace pycomm::host {

namespace {

constexpr std::uint64_t kUnlimited = std::uint64_t{1} << 60;  // version 1 writes a huge number

/// Where a version keeps its numbers.
struct Version {
  const char* limit;
  const char* usage;
  const char* droppable[2];  // in memory.stat: cached files
};
constexpr Version kVersion1{
    "/memory.limit_in_bytes", "/memory.usage_in_bytes", {"total_inactive_file", "total_active_file"}};
constexpr Version kVersion2{"/memory.max", "/memory.current", {"inactive_file", "active_file"}};

std::optional<std::uint64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t number = 0;
  if (file >> number) return number;
  return std::nullopt;  // "max", too
}

/// The number after `key` in a file of "key number" lines.
std::uint64_t value_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    std::uint64_t number = 0;
    if (words >> name >> number && name == key) return number;
  }
  return 0;
}

void add_group(std::vector<MemoryLimit>& limits, const std::string& folder, const Version& version) {
  const auto limit = number_in(folder + version.limit);
  const auto usage = number_in(folder + version.usage);
  struct stat status{};
  if (!limit || !usage || *limit >= kUnlimited || ::stat(folder.c_str(), &status) != 0) return;
  std::uint64_t used = *usage;
  for (const char* const files : version.droppable) used -= std::min(used, value_of(folder + "/memory.stat", files));
  const std::uint64_t id = static_cast<std::uint64_t>(status.st_dev) << 40 ^ static_cast<std::uint64_t>(status.st_ino);
  limits.push_back({id, *limit > used ? *limit - used : 0});
}

/// Of the group at `path` and of those above it, as far as they are seen here. `line`: of /proc/self/mountinfo.
void add_groups(std::vector<MemoryLimit>& limits, const std::string& root, const std::string& line,
                const std::string& path, bool is_version_2) {
  std::istringstream words(line);
  std::string skipped;
  std::string top;  // the group that the mount shows
  std::string mount;
  words >> skipped >> skipped >> skipped >> top >> mount;
  std::string below = path;
  if (top != "/") below = path.starts_with(top) ? path.substr(top.size()) : "";
  while (!below.empty() && below.back() == '/') below.pop_back();
  while (true) {
    add_group(limits, root + mount + below, is_version_2 ? kVersion2 : kVersion1);
    if (below.empty()) return;
    below.erase(below.rfind('/'));
  }
}

/// Whether a line of /proc/self/mountinfo is of the hierarchy that has the memory of version 1, or all of version 2.
bool is_hierarchy(const std::string& line, bool is_version_2) {
  const std::size_t behind = line.find(" - ");
  if (behind == std::string::npos) return false;
  std::istringstream words(line.substr(behind + 3));
  std::string type;
  std::string source;
  std::string options;
  words >> type >> source >> options;
  if (is_version_2) return type == "cgroup2";
  return type == "cgroup" && ("," + options + ",").find(",memory,") != std::string::npos;
}

}  // namespace

std::vector<MemoryLimit> memory_limits(const std::string& root) {
  std::vector<MemoryLimit> limits;
  const std::uint64_t kib = value_of(root + "/proc/meminfo", "MemAvailable:");
  if (kib != 0) limits.push_back({MemoryLimit::kHost, kib * 1024});
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string group; std::getline(groups, group);) {  // "4:memory:/path" or "0::/path"
    const std::size_t first = group.find(':');
    const std::size_t second = first == std::string::npos ? first : group.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + group.substr(first + 1, second - first - 1) + ",";
    const bool is_version_2 = controllers == ",,";
    if (!is_version_2 && controllers.find(",memory,") == std::string::npos) continue;
    std::ifstream mounts(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(mounts, line);) {
      if (!is_hierarchy(line, is_version_2)) continue;
      add_groups(limits, root, line, group.substr(second + 1), is_version_2);
      break;
    }
  }
  return limits;
}

}  // namespace pycomm::host
