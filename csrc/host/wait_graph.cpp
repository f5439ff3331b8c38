#include "host/wait_graph.hpp"

#include <algorithm>

#include "host/bootstrap.hpp"
#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

void set_bits(std::uint64_t* words, const std::vector<int>& ranks) {
  for (std::size_t w = 0; w < kRankWords; ++w) {
    std::uint64_t word = 0;
    for (const int r : ranks) {
      if (static_cast<std::size_t>(r) / 64 == w) word |= std::uint64_t{1} << (r % 64);
    }
    store_note(words[w], word);
  }
}

bool has_bit(const std::uint64_t* words, int rank) { return (load_flag(words[rank / 64]) >> (rank % 64) & 1) != 0; }

std::vector<int> bits(const std::uint64_t* words, int world_size) {
  std::vector<int> ranks;
  for (int r = 0; r < world_size; ++r) {
    if (has_bit(words, r)) ranks.push_back(r);
  }
  return ranks;
}

}  // namespace

WaitGraph::WaitGraph(const Membership& world)
    : control_(world.control), rank_(world.rank), world_size_(world.world_size), tokens_(world.tokens) {}

std::vector<int> WaitGraph::ranks_of(const std::vector<std::uint64_t>& tokens) const {
  std::vector<int> ranks;
  for (const std::uint64_t token : tokens) {
    ranks.push_back(static_cast<int>(std::find(tokens_.begin(), tokens_.end(), token) - tokens_.begin()));
  }
  return ranks;
}

void WaitGraph::issue() {
  const std::thread::id self = std::this_thread::get_id();
  std::thread::id nobody;
  if (!issuer_.compare_exchange_strong(nobody, self) && nobody != self) several_issuers_ = true;
}

std::shared_ptr<void> WaitGraph::start_async() {
  add_flag(mine().num_async, 1u);
  // Its end is counted after all that it did is visible.
  return {nullptr, [control = control_, rank = rank_](void*) { add_flag(control.flags(rank).waiting.num_async, ~0u); }};
}

/// Version even: nothing to read; odd: the record holds. Readers look at it before and after.
void WaitGraph::show(const Needs& needs) const {
  const std::uint64_t version = load_flag(mine().version);
  if (version % 2 == 1) store_flag(mine().version, version + 1);
  set_bits(mine().all, needs.all);
  set_bits(mine().any, needs.any);
  store_flag(mine().version, (version + 1) / 2 * 2 + 1);
}

WaitGraph::Shown WaitGraph::read(int rank) const {
  const WaitRecord& record = this->record(rank);
  Shown shown{.version = load_flag(record.version),
              .moves = load_flag(record.moves),
              .looks = load_flag(record.looks),
              .waits = false,
              .needs = {bits(record.all, world_size_), bits(record.any, world_size_)}};
  shown.waits =
      shown.version % 2 == 1 && load_flag(record.num_async) == 0 && load_flag(record.version) == shown.version;
  return shown;
}

std::vector<WaitGraph::Shown> WaitGraph::read_all() const {
  std::vector<Shown> all;
  for (int r = 0; r < world_size_; ++r) all.push_back(read(r));
  return all;
}

std::vector<bool> WaitGraph::deadlocked(const std::vector<Shown>& shown) {
  std::vector<bool> stuck;
  for (const Shown& rank : shown) stuck.push_back(rank.waits);
  const auto is_stuck = [&](int rank) { return stuck[static_cast<std::size_t>(rank)]; };
  for (bool changed = true; changed;) {
    changed = false;
    for (std::size_t r = 0; r < shown.size(); ++r) {
      const Needs& needs = shown[r].needs;
      const bool held = std::any_of(needs.all.begin(), needs.all.end(), is_stuck) ||
                        (!needs.any.empty() && std::all_of(needs.any.begin(), needs.any.end(), is_stuck));
      if (!stuck[r] || held) continue;
      stuck[r] = false;
      changed = true;
    }
  }
  return stuck;
}

std::string WaitGraph::describe_cycle(const std::vector<Shown>& shown, const std::vector<bool>& stuck) const {
  // From any of them along needs inside the set, until a rank comes for the second time: the way between is a cycle.
  std::vector<int> way;
  int rank = static_cast<int>(std::find(stuck.begin(), stuck.end(), true) - stuck.begin());
  while (std::find(way.begin(), way.end(), rank) == way.end()) {
    way.push_back(rank);
    const Needs& needs = shown[static_cast<std::size_t>(rank)].needs;
    const auto is_stuck = [&](int r) { return stuck[static_cast<std::size_t>(r)]; };
    const auto next = std::find_if(needs.all.begin(), needs.all.end(), is_stuck);
    rank = next != needs.all.end() ? *next : needs.any.front();
  }
  way.erase(way.begin(), std::find(way.begin(), way.end(), rank));
  std::rotate(way.begin(), std::min_element(way.begin(), way.end()), way.end());  // every rank tells it alike
  std::string text;
  for (const int r : way) text += "rank " + std::to_string(r) + " in " + record(r).what + " -> ";
  return text + "rank " + std::to_string(way.front());
}

WatchedWait::WatchedWait(WaitGraph& graph, const std::vector<int>& ranks, const std::string& what)
    : graph_(graph), ranks_(ranks) {
  if (!graph.several_issuers_) put_text(graph.mine().what, what);
}

WatchedWait::~WatchedWait() {
  const std::uint64_t version = load_flag(graph_.mine().version);
  if (shown_ && version % 2 == 1) store_flag(graph_.mine().version, version + 1);
}

void WatchedWait::look(const Needs& needs) {
  if (graph_.several_issuers_) return;
  Needs in_world;
  for (const int r : needs.all) in_world.all.push_back(ranks_[static_cast<std::size_t>(r)]);
  for (const int r : needs.any) in_world.any.push_back(ranks_[static_cast<std::size_t>(r)]);
  if (shown_ != in_world) {
    graph_.show(in_world);
    shown_ = std::move(in_world);
  }
  add_flag(graph_.mine().looks, std::uint64_t{1});
  obey_verdicts();

  const std::vector<WaitGraph::Shown> now = graph_.read_all();
  const std::vector<bool> stuck = WaitGraph::deadlocked(now);
  if (!stuck[static_cast<std::size_t>(graph_.rank_)]) return before_.clear();
  bool same = !before_.empty() && stuck == stuck_before_;
  bool looked = true;
  for (std::size_t r = 0; same && r < now.size(); ++r) {
    if (!stuck[r]) continue;
    same = now[r].same(before_[r]);
    looked &= now[r].looks >= before_[r].looks + 2;
  }
  if (!same) {
    before_ = now;
    stuck_before_ = stuck;
  } else if (looked) {
    judge(now, stuck);
    obey_verdicts();
  }
}

/// Say it to all of them at once, with one flag, so that none sees another's failure before it knows why.
void WatchedWait::judge(const std::vector<WaitGraph::Shown>& shown, const std::vector<bool>& stuck) const {
  Verdict& verdict = graph_.control_.flags(graph_.rank_).verdict;
  put_text(verdict.cycle, graph_.describe_cycle(shown, stuck));
  for (std::size_t r = 0; r < shown.size(); ++r) store_note(verdict.version[r], stuck[r] ? shown[r].version : 0);
  store_flag(verdict.number, load_flag(verdict.number) + 1);
}

void WatchedWait::obey_verdicts() const {
  const std::uint64_t version = load_flag(graph_.mine().version);
  for (int r = 0; r < graph_.world_size_; ++r) {
    const Verdict& verdict = graph_.control_.flags(r).verdict;
    if (load_flag(verdict.number) == 0 || load_flag(verdict.version[graph_.rank_]) != version) continue;
    throw Error(ErrorKind::kDeadlock,
                std::string("these calls wait for each other, here and on NCCL: ") + verdict.cycle +
                    ". Let messages that must go both ways progress together in one batch(), and let all ranks call "
                    "their collectives and messages in one order");
  }
}

}  // namespace pycomm::host
