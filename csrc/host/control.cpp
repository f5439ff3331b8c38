#include "host/control.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

std::size_t slot_stride(const Tuning& tuning) { return sizeof(CallSlot) + tuning.slice_bytes; }
std::size_t channels_offset(const Tuning& tuning) { return sizeof(RankFlags) + 2 * slot_stride(tuning); }
std::size_t area_stride(int world_size, const Tuning& tuning) {
  const std::size_t channels = static_cast<std::size_t>(world_size) * tuning.channel.bytes();
  return round_to_pages(channels_offset(tuning) + channels);  // whole pages: their owner touches them first
}

/// Of the cache that all cores share. The kernel's figure: under a hypervisor, sysconf's may be that of a larger one.
std::uint64_t last_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
  std::uint64_t kib = 0;
  if (file >> kib && kib != 0) return kib * 1024;
  const long l3 = ::sysconf(_SC_LEVEL3_CACHE_SIZE);
  return l3 > 0 ? static_cast<std::uint64_t>(l3) : 8 * 1024 * 1024;
}

constexpr std::uint64_t kKiB = 1024;
constexpr std::uint64_t kMostOneShot = 16 * kKiB;  // what every slice has room for beside a line a rank (rounds.cpp)

struct Range {
  const char* name;
  std::uint64_t& (*in)(Tuning&);
  std::uint64_t least;
  std::uint64_t most;
  std::uint64_t multiple;
};
// A slice holds whatever ranks agree on by way of staging (agree.hpp), and a line for each of kMaxRanks.
constexpr Range kRanges[] = {
    {"slice_bytes", [](Tuning& t) -> std::uint64_t& { return t.slice_bytes; }, 32 * kKiB, 16 * kKiB * kKiB, kCacheLine},
    {"one_shot_bytes", [](Tuning& t) -> std::uint64_t& { return t.one_shot_bytes; }, 0, kMostOneShot, 1},
    {"cached_bytes", [](Tuning& t) -> std::uint64_t& { return t.cached_bytes; }, 0, 1 << 30, 1},
    {"eager_bytes", [](Tuning& t) -> std::uint64_t& { return t.channel.eager_bytes; }, 0, kKiB * kKiB, kCacheLine},
    {"stream_bytes", [](Tuning& t) -> std::uint64_t& { return t.channel.stream_bytes; }, 4 * kKiB, 16 * kKiB * kKiB,
     kCacheLine},
};

/// Empty if `value` is in the range.
std::string outside(const Range& range, std::uint64_t value) {
  if (value >= range.least && value <= range.most && value % range.multiple == 0) return {};
  return std::string(range.name) + "=" + std::to_string(value) + ": it is from " + std::to_string(range.least) +
         " to " + std::to_string(range.most) +
         (range.multiple > 1 ? " and a multiple of " + std::to_string(range.multiple) : std::string());
}

const Range& range_of(const std::string& name) {
  std::string names;
  for (const Range& range : kRanges) {
    if (name == range.name) return range;
    names += (names.empty() ? "" : ", ") + std::string(range.name);
  }
  throw std::invalid_argument("there is no threshold '" + name + "'; it is one of " + names);
}

}  // namespace

namespace {

std::size_t words_used(const Waits& waits) {
  return (offsetof(Waits, roots) + waits.num_roots * sizeof(RootProcess)) / sizeof(std::uint64_t);
}

}  // namespace

void WaitsRecord::write(const Waits& waits) {
  std::uint64_t copy[std::size(WaitsRecord{}.words)];
  std::memcpy(copy, &waits, sizeof(waits));
  store_flag(version, version + 1);
  for (std::size_t i = 0; i < words_used(waits); ++i) store_note(words[i], copy[i]);
  store_flag(version, version + 1);
}

bool WaitsRecord::read(Waits& waits) const {
  constexpr int kTries = 100;
  std::uint64_t copy[std::size(WaitsRecord{}.words)] = {};
  for (int i = 0; i < kTries; ++i) {
    const std::uint64_t before = load_flag(version);
    if (before % 2 != 0) continue;
    const auto take = [&](std::size_t end) {
      for (std::size_t w = 0; w < end; ++w) copy[w] = load_flag(words[w]);
      std::memcpy(&waits, copy, sizeof(waits));
      waits.num_roots = std::min<std::uint32_t>(waits.num_roots, kMaxRanks);
    };
    take(offsetof(Waits, roots) / sizeof(std::uint64_t));
    take(words_used(waits));
    if (load_flag(version) == before) return true;
  }
  return false;
}

Thresholds thresholds_of(const Tuning& tuning) {
  Tuning copy = tuning;
  Thresholds thresholds;
  for (const Range& range : kRanges) thresholds[range.name] = range.in(copy);
  return thresholds;
}

Tuning tuning_with(int world_size, const Thresholds& thresholds) {
  Tuning tuning = default_tuning(world_size);
  for (const auto& [name, value] : thresholds) {
    const Range& range = range_of(name);
    if (const std::string problem = outside(range, value); !problem.empty()) throw std::invalid_argument(problem);
    range.in(tuning) = value;
  }
  return tuning;
}

std::string unusable(const Tuning& tuning) {
  for (const auto& [name, value] : thresholds_of(tuning)) {
    if (std::string problem = outside(range_of(name), value); !problem.empty()) return problem;
  }
  return tuning.strict > 1 ? "strict=" + std::to_string(tuning.strict) + ": it is 0 or 1" : std::string();
}

Tuning default_tuning(int world_size) {
  const long l2 = ::sysconf(_SC_LEVEL2_CACHE_SIZE);
  const std::uint64_t own_cache = l2 > 0 ? static_cast<std::uint64_t>(l2) : 512 * kKiB;
  // As large as the writer's own cache, so that most of a slice has left it for the cache that all share before a peer
  // reads it: lines out of another core's cache come several times slower. All ranks' staging buffers, two each, take a
  // quarter of the shared cache at most.
  const std::uint64_t shared = last_cache_bytes() / (8 * static_cast<std::uint64_t>(world_size));
  const std::uint64_t slice = std::clamp<std::uint64_t>(std::min(own_cache, shared), 64 * kKiB, 2048 * kKiB);
  return Tuning{.slice_bytes = slice / kCacheLine * kCacheLine,
                .one_shot_bytes = 4 * 1024,
                // Other things live in the last cache, too.
                .cached_bytes = last_cache_bytes() / 4 * 3,
                .strict = 0,
                .channel = ChannelSizes::for_ranks(world_size)};
}

Control::Control(Segment segment, int world_size, const Tuning& tuning)
    : segment_(std::make_shared<Segment>(std::move(segment))),
      slot_stride_(slot_stride(tuning)),
      channels_offset_(channels_offset(tuning)),
      channel_sizes_(tuning.channel),
      area_stride_(area_stride(world_size, tuning)) {
  if (segment_->bytes() < bytes_for(world_size, tuning)) {
    throw Error(ErrorKind::kGeneral, "control segment has " + std::to_string(segment_->bytes()) + " bytes, needs " +
                                         std::to_string(bytes_for(world_size, tuning)));
  }
}

std::size_t Control::bytes_for(int world_size, const Tuning& tuning) {
  return static_cast<std::size_t>(world_size) * area_stride(world_size, tuning);
}

}  // namespace pycomm::host
