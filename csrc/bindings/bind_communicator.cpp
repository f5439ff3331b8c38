#include <pybind11/stl.h>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/names.hpp"
#include "host/communicator.hpp"
#include "host/memory_limits.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using host::Communicator;
using host::Listener;
using host::SymmetricBuffer;

void* as_pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

/// What a rank brings to a meeting, from Python.
struct Guest {
  std::string group;
  int rank;
  int world_size;
  const Listener* listener;
  std::string address;
};

/// Without the GIL. `check(missing)`: Python's, or None.
std::unique_ptr<Communicator> connect(const Guest& guest, const host::Tuning& tuning, double timeout_s,
                                      std::vector<int> names, const py::object& check) {
  host::Meeting meeting{.names = std::move(names),
                        .deadline = Deadline::after(timeout_s),
                        .interrupt = &check_signals,
                        .check = {},
                        .expire = {}};
  if (!check.is_none()) {
    meeting.check = [&check](const std::vector<int>& missing) {
      const py::gil_scoped_acquire gil;
      check(missing);
    };
  }
  auto members = host::meet(guest.rank, guest.world_size, guest.listener, guest.address, tuning, meeting);
  return std::make_unique<Communicator>(guest.group, std::move(members), timeout_s, &check_signals);
}

}  // namespace

void bind_communicator(py::module_& module) {
  module.def("build_id", &host::build_id);
  module.def("process_token", &host::process_token);
  module.def("protocol_version", [] { return host::kProtocolVersion; });
  module.def("memory_left", [](const std::string& root) {
    std::vector<std::uint64_t> left;
    for (const host::MemoryLimit& limit : host::memory_limits(root)) left.push_back(limit.left);
    return left;
  });
  module.attr("MAX_RANKS") = host::kMaxRanks;
  module.attr("ADDRESS_DIGITS") = host::Invitation::kHexDigits;
  module.def(
      "tuning",
      [](int world_size, const host::Thresholds& thresholds) {
        return host::thresholds_of(host::tuning_with(world_size, thresholds));
      },
      py::arg("world_size"), py::arg("thresholds"));

  py::class_<SymmetricBuffer>(module, "SymmetricBuffer", py::buffer_protocol()).def_buffer([](SymmetricBuffer& buffer) {
    return py::buffer_info(reinterpret_cast<std::uint8_t*>(buffer.data()), static_cast<py::ssize_t>(buffer.bytes()));
  });

  py::class_<Listener>(module, "Listener").def(py::init<>()).def_property_readonly("address", &Listener::address);

  CommunicatorClass communicator(module, "HostCommunicator");
  communicator
      .def(py::init([](std::string name, int rank, int world_size, const Listener* listener, std::string address,
                       double timeout_s, bool strict, const host::Thresholds& thresholds, std::vector<int> names,
                       const py::object& check) {
             host::Tuning tuning = host::tuning_with(world_size, thresholds);
             tuning.strict = strict ? 1 : 0;
             const Guest guest{std::move(name), rank, world_size, listener, std::move(address)};
             const GilRelease nogil;
             return CommunicatorHolder(connect(guest, tuning, timeout_s, std::move(names), check).release());
           }),
           py::arg("name"), py::arg("rank"), py::arg("world_size"), py::arg("listener"), py::arg("address"),
           py::arg("timeout_s"), py::arg("strict"), py::arg("thresholds"), py::arg("names") = std::vector<int>(),
           py::arg("check") = py::none())
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("world_size", &Communicator::world_size)
      .def_property_readonly("name", &Communicator::name)
      .def_property_readonly("tokens", &Communicator::tokens)
      .def("tuning", [](const Communicator& self) { return host::thresholds_of(self.tuning()); })
      .def("empty", &Communicator::empty, py::arg("bytes"), py::arg("timeout_s"), NoGil())
      .def(
          "agree",
          [](Communicator& self, const std::string& row, std::string_view kind, std::uint64_t count, double timeout_s) {
            std::string rows;
            {
              const GilRelease nogil;
              rows = self.agree(row, parse<OpKind>(kind, kNumOpKinds, "call"), count, timeout_s);
            }
            py::list by_rank;
            for (int r = 0; r < self.world_size(); ++r) {
              by_rank.append(py::bytes(rows.substr(static_cast<std::size_t>(r) * row.size(), row.size())));
            }
            return by_rank;
          })
      .def("peer", [](Communicator& self, std::uintptr_t data, std::size_t bytes,
                      int rank) { return self.peer(as_pointer(data), bytes, rank); })
      .def("is_symmetric", [](Communicator& self, std::uintptr_t data,
                              std::size_t bytes) { return self.is_symmetric(as_pointer(data), bytes); })
      .def("post", [](Communicator& self, std::uintptr_t flag,
                      std::uint64_t value) { self.post(*static_cast<std::uint64_t*>(as_pointer(flag)), value); })
      .def("wait_posted",
           [](Communicator& self, std::uintptr_t flag, std::uint64_t value, py::handle rank, py::handle timeout_s) {
             const int only = rank.is_none() ? host::Group::kEveryRank : rank_of(rank, self.world_size(), "rank");
             const double seconds = timeout_of(timeout_s);
             const auto& own = *static_cast<const std::uint64_t*>(as_pointer(flag));
             const GilRelease nogil;
             self.wait_posted(own, value, only, seconds);
           })
      .def(
          "exchange_fds",
          [](Communicator& self, int fd, double timeout_s) {
            std::vector<int> fds;
            for (host::UniqueFd& each : self.exchange_fds(fd, timeout_s)) fds.push_back(each.release());
            return fds;
          },
          py::arg("fd"), py::arg("timeout_s"), NoGil())
      .def(
          "split",
          [](Communicator& self, std::optional<std::int64_t> color, std::int64_t key, double timeout_s) {
            return CommunicatorHolder(self.split(color, key, timeout_s).release());
          },
          NoGil())
      .def("abort", &Communicator::abort)
      .def("close", &Communicator::close, py::arg("drain_s"), NoGil());
}

}  // namespace pycomm::bindings
