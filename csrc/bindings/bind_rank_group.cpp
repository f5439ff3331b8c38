// Symmetric memory on GPUs, and the kernels of the ranks that this process launches for. Addresses are the device's;
// pycomm/gpu gives them those of tensors that it has checked.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "bindings/addresses.hpp"
#include "bindings/bindings.hpp"
#include "bindings/exported.hpp"
#include "cuda/kernels/all_gather.hpp"
#include "cuda/kernels/all_reduce.hpp"
#include "cuda/kernels/bucket.hpp"
#include "cuda/kernels/put_get.hpp"
#include "cuda/kernels/reduce_scatter.hpp"
#include "cuda/kernels/sharded_adamw.hpp"
#include "cuda/runtime/rank_group.hpp"
#include "nccl/window.hpp"

namespace py = pybind11;

namespace pycomm::bindings {
namespace {

using namespace pycomm::cuda;  // NOLINT: this file is about it
using Memory = std::shared_ptr<SymmetricMemory>;
using GroupHolder = std::unique_ptr<RankGroup, WithoutGil>;

/// As many addresses as there are ranks, or none, into a kernel's parameters.
template <class Pointer>
void fill(Pointer (&to)[kMaxRanks], const Addresses& from, int num_ranks, const char* what) {
  if (from.empty()) return;
  if (static_cast<int>(from.size()) != num_ranks) {
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(from.size()) + " addresses for " +
                                std::to_string(num_ranks) + " ranks");
  }
  std::transform(from.begin(), from.end(), to, [](Address address) { return reinterpret_cast<Pointer>(address); });
}

/// A kernel's grid, as Python passes it: (blocks, threads).
using Grid = std::pair<int, int>;

/// The stream that a kernel goes to; none: the rank's own.
using OnStream = std::optional<Address>;

LaunchShape shape_of(const RankGroup& ranks, int rank, Grid grid, OnStream stream = std::nullopt) {
  LaunchShape shape = ranks.shape(rank, grid.first, grid.second);
  if (stream) shape.stream = reinterpret_cast<Stream>(*stream);
  return shape;
}
/// Puts and gets of all ranks wait for each other.
LaunchShape channel_shape(const RankGroup& ranks, int rank, Grid grid) {
  LaunchShape shape = shape_of(ranks, rank, grid);
  shape.num_waiting *= 2;
  return shape;
}

void one_shot(const RankGroup& ranks, int rank, const std::string& dtype, const std::string& wire,
              const std::string& op, std::int64_t count, int chunk, Address input, Address output,
              const Addresses& staging, std::size_t staging_bytes, Grid grid, OnStream stream) {
  OneShotParams params{ranks.group(rank),
                       parse_dtype(dtype),
                       parse_dtype(wire),
                       parse_op(op),
                       flat_layout(count, chunk),
                       pointer<const void>(input),
                       pointer<void>(output),
                       {},
                       staging_bytes,
                       nullptr};
  fill(params.staging, staging, ranks.world_size(), "staging");
  launch_all_reduce_one_shot(params, shape_of(ranks, rank, grid, stream));
}

void two_shot(const RankGroup& ranks, int rank, const std::string& dtype, const std::string& op, std::int64_t count,
              const Addresses& data, const Addresses& squares, Grid grid, OnStream stream) {
  TwoShotParams params{ranks.group(rank), parse_dtype(dtype), parse_op(op), flat_layout(count), {}, {}};
  fill(params.data, data, ranks.world_size(), "data");
  fill(params.squares, squares, ranks.world_size(), "squares");
  launch_all_reduce_two_shot(params, shape_of(ranks, rank, grid, stream));
}

void reduce_scatter(const RankGroup& ranks, int rank, const std::string& dtype, const std::string& output_dtype,
                    const std::string& op, std::int64_t count, const Addresses& inputs, Address output,
                    const Addresses& squares, Grid grid) {
  ReduceScatterParams params{ranks.group(rank),         parse_dtype(dtype),
                             parse_dtype(output_dtype), parse_op(op),
                             flat_layout(count),        {},
                             pointer<void>(output),     {}};
  fill(params.input, inputs, ranks.world_size(), "inputs");
  fill(params.squares, squares, ranks.world_size(), "squares");
  launch_reduce_scatter(params, shape_of(ranks, rank, grid));
}

void all_gather(const RankGroup& ranks, int rank, Address input, std::int64_t bytes, const Addresses& outputs,
                Grid grid) {
  AllGatherParams params{ranks.group(rank), pointer<const std::byte>(input), bytes, {}};
  fill(params.output, outputs, ranks.world_size(), "outputs");
  launch_all_gather(params, shape_of(ranks, rank, grid));
}

template <class Pointer>
Channel channel_of(const RankGroup& ranks, int rank, int peer, std::int64_t bytes, const Addresses& slots,
                   Pointer (&to)[kMaxSlots]) {
  const int num_slots = static_cast<int>(slots.size());
  for (int slot = 0; slot < std::min(num_slots, kMaxSlots); ++slot) {
    to[slot] = reinterpret_cast<Pointer>(slots[static_cast<std::size_t>(slot)]);
  }
  return {ranks.group(rank), peer, num_slots, bytes};
}

void put(const RankGroup& ranks, int rank, int peer, Address input, std::int64_t bytes, const Addresses& slots,
         Grid grid) {
  PutParams params{{}, pointer<const std::byte>(input), {}};
  params.channel = channel_of(ranks, rank, peer, bytes, slots, params.slots);
  launch_put(params, channel_shape(ranks, rank, grid));
}

void get(const RankGroup& ranks, int rank, int peer, Address output, std::int64_t bytes, const Addresses& slots,
         Grid grid) {
  GetParams params{{}, {}, pointer<std::byte>(output)};
  params.channel = channel_of(ranks, rank, peer, bytes, slots, params.slots);
  launch_get(params, channel_shape(ranks, rank, grid));
}

/// A bucket: the address of its table of segments, their number, that of chunks, and of its elements.
using Table = std::tuple<Address, int, std::int64_t, std::int64_t>;

void bucket(const RankGroup& ranks, int rank, bool gather, const std::string& tensor_dtype,
            const std::string& bucket_dtype, const Table& table, Address memory, float scale, bool accumulate,
            Address squares, Address non_finite, Grid grid) {
  const auto& [segments, num_segments, num_chunks, num_elements] = table;
  const BucketParams params{parse_dtype(tensor_dtype),
                            parse_dtype(bucket_dtype),
                            {pointer<const Segment>(segments), num_segments, kChunkElements, num_chunks, num_elements},
                            pointer<void>(memory),
                            scale,
                            accumulate,
                            pointer<double>(squares),
                            pointer<std::uint32_t>(non_finite)};
  (gather ? launch_bucket_gather : launch_bucket_scatter)(params, shape_of(ranks, rank, grid));
}

void norm(const RankGroup& ranks, int rank, Address squares, std::int64_t num_squares, float max_norm, Address result) {
  launch_norm({pointer<const double>(squares), num_squares, max_norm, pointer<ClipResult>(result)}, ranks.stream(rank));
}

/// (lr, beta1, beta2, eps, weight_decay, step)
using Hyperparameters = std::tuple<double, double, double, double, double, std::int64_t>;

void sharded_adamw(const RankGroup& ranks, int rank, const std::string& grad_dtype, const std::string& param_dtype,
                   std::int64_t count, const Addresses& grads, bool average, const std::array<Address, 3>& state,
                   const Addresses& parameters, const Hyperparameters& options, Address clip, Grid grid) {
  const auto& [lr, beta1, beta2, eps, weight_decay, step] = options;
  ShardedAdamWParams params{ranks.group(rank),
                            parse_dtype(grad_dtype),
                            parse_dtype(param_dtype),
                            flat_layout(count),
                            {},
                            static_cast<int>(grads.size()),
                            average,
                            pointer<float>(state[0]),
                            pointer<float>(state[1]),
                            pointer<float>(state[2]),
                            {},
                            adamw_factors({lr, beta1, beta2, eps, weight_decay}, step),
                            pointer<const ClipResult>(clip)};
  fill(params.grads, grads, std::min(static_cast<int>(grads.size()), kMaxRanks), "grads");
  fill(params.params, parameters, ranks.world_size(), "parameters");
  launch_sharded_adamw(params, shape_of(ranks, rank, grid));
}

/// Parts that the caller has, and keeps: peers that are played by other memory, for measurements.
class BorrowedMemory final : public SymmetricMemory {
 public:
  BorrowedMemory(const Addresses& parts, std::size_t bytes)
      : SymmetricMemory("borrowed", static_cast<int>(parts.size()), bytes) {
    std::transform(parts.begin(), parts.end(), parts_.begin(), &pointer<std::byte>);
  }
};

/// Unmapping waits for the device.
Memory shared(std::unique_ptr<SymmetricMemory> memory) { return {memory.release(), WithoutGil{}}; }

Memory memory_of_processes(host::Communicator& communicator, int device, std::size_t bytes, double timeout_s) {
  return shared(shared_handle_memory(device, communicator.rank(), communicator.world_size(), bytes, [&](int fd) {
    std::vector<int> fds;
    for (host::UniqueFd& each : communicator.exchange_fds(fd, timeout_s)) fds.push_back(each.release());
    return fds;
  }));
}

}  // namespace

void bind_rank_group(py::module_& module) {
  py::class_<SymmetricMemory, Memory>(module, "GpuMemory")
      .def_static(
          "virtual_ranks",
          [](int device, int world_size, std::size_t bytes) -> Memory {
            return shared(virtual_rank_memory(device, world_size, bytes));
          },
          py::arg("device"), py::arg("world_size"), py::arg("bytes"), NoGil())
      .def_static("processes", &memory_of_processes, py::arg("communicator"), py::arg("device"), py::arg("bytes"),
                  py::arg("timeout_s"), NoGil())
      .def_static(
          "window",
          [](const std::shared_ptr<nccl::Window>& window, int device) -> Memory {
            return shared(window_memory(device, window->rank(), window->parts(), window->bytes(), window));
          },
          py::arg("window"), py::arg("device"), NoGil())
      .def_static(
          "borrowed",
          [](const Addresses& parts, std::size_t bytes) -> Memory {
            return std::make_shared<BorrowedMemory>(parts, bytes);
          },
          py::arg("parts"), py::arg("bytes"))
      .def_property_readonly("provider", &SymmetricMemory::provider)
      .def_property_readonly("world_size", &SymmetricMemory::world_size)
      .def_property_readonly("bytes", &SymmetricMemory::bytes)
      .def("part",
           [](const SymmetricMemory& memory, int rank) { return reinterpret_cast<Address>(memory.part(rank)); });

  py::class_<RankGroup, GroupHolder>(module, "RankGroup")
      .def(py::init([](Memory pads, int device, std::vector<int> local_ranks, double timeout_s) {
             return GroupHolder(make_rank_group(std::move(pads), device, std::move(local_ranks), timeout_s).release());
           }),
           py::arg("pads"), py::arg("device"), py::arg("local_ranks"), py::arg("timeout_s"))
      .def_property_readonly("world_size", &RankGroup::world_size)
      .def_property_readonly("local_ranks", &RankGroup::local_ranks)
      .def("stream", [](const RankGroup& ranks, int rank) { return reinterpret_cast<Address>(ranks.stream(rank)); })
      .def("fork", [](RankGroup& ranks, Address caller) { ranks.fork(reinterpret_cast<Stream>(caller)); })
      .def("join", [](RankGroup& ranks, Address caller) { ranks.join(reinterpret_cast<Stream>(caller)); })
      .def("check", &RankGroup::check)
      .def("wait", &RankGroup::wait, py::arg("timeout_s"), NoGil())
      .def("abort", &RankGroup::abort)
      .def("abort_word",
           [](const RankGroup& ranks, int rank) { return reinterpret_cast<Address>(ranks.abort_word(rank)); })
      .def("status", [](const RankGroup& ranks, int rank) { return reinterpret_cast<Address>(ranks.status(rank)); })
      .def_static(
          "staging_bytes",
          [](const std::string& wire, std::int64_t count, int chunk, Grid grid) {
            return one_shot_staging_bytes(flat_layout(count, chunk), parse_dtype(wire),
                                          {grid.first, grid.second, nullptr});
          },
          py::arg("wire"), py::arg("count"), py::arg("chunk"), py::arg("grid"))
      .def("all_reduce_one_shot", &one_shot, py::arg("rank"), py::arg("dtype"), py::arg("wire"), py::arg("op"),
           py::arg("count"), py::arg("chunk"), py::arg("input"), py::arg("output"), py::arg("staging"),
           py::arg("staging_bytes"), py::arg("grid"), py::arg("stream") = py::none())
      .def("all_reduce_two_shot", &two_shot, py::arg("rank"), py::arg("dtype"), py::arg("op"), py::arg("count"),
           py::arg("data"), py::arg("squares"), py::arg("grid"), py::arg("stream") = py::none())
      .def("reduce_scatter", &reduce_scatter, py::arg("rank"), py::arg("dtype"), py::arg("output_dtype"), py::arg("op"),
           py::arg("count"), py::arg("inputs"), py::arg("output"), py::arg("squares"), py::arg("grid"))
      .def("all_gather", &all_gather, py::arg("rank"), py::arg("input"), py::arg("bytes"), py::arg("outputs"),
           py::arg("grid"))
      .def("put", &put, py::arg("rank"), py::arg("peer"), py::arg("input"), py::arg("bytes"), py::arg("slots"),
           py::arg("grid"))
      .def("get", &get, py::arg("rank"), py::arg("peer"), py::arg("output"), py::arg("bytes"), py::arg("slots"),
           py::arg("grid"))
      .def("bucket", &bucket, py::arg("rank"), py::arg("gather"), py::arg("tensor_dtype"), py::arg("bucket_dtype"),
           py::arg("table"), py::arg("bucket"), py::arg("scale"), py::arg("accumulate"), py::arg("squares"),
           py::arg("non_finite"), py::arg("grid"))
      .def("norm", &norm, py::arg("rank"), py::arg("squares"), py::arg("num_squares"), py::arg("max_norm"),
           py::arg("result"))
      .def("sharded_adamw", &sharded_adamw, py::arg("rank"), py::arg("grad_dtype"), py::arg("param_dtype"),
           py::arg("count"), py::arg("grads"), py::arg("average"), py::arg("state"), py::arg("parameters"),
           py::arg("options"), py::arg("clip"), py::arg("grid"));
  module.def(
      "dlpack",
      [](Address address, std::int64_t bytes, int device, py::object owner) {
        const auto type = device < 0 ? dlpack::kCpu : dlpack::kCuda;
        return exported(pointer<void>(address), bytes, {type, std::max(device, 0)}, std::move(owner));
      },
      py::arg("address"), py::arg("bytes"), py::arg("device"), py::arg("owner"));
  module.attr("SIGNAL_PAD_BYTES") = sizeof(SignalPad);
  module.attr("MAX_KERNEL_RANKS") = kMaxRanks;
  module.attr("MAX_KERNEL_BLOCKS") = kMaxBlocks;
  module.attr("MAX_KERNEL_THREADS") = kMaxThreads;
  module.attr("ONE_SHOT_BLOCKS") = kOneShotBlocks;
  module.attr("CHUNK_ELEMENTS") = kChunkElements;
}

}  // namespace pycomm::bindings
