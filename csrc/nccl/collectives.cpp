// The calls of a Communicator in NCCL's terms. Parts that differ in size, and what NCCL has no collective for in every
// version, are groups.
#include <stdexcept>

#include "nccl/communicator.hpp"

namespace pycomm::nccl {

namespace {

/// What NCCL is told of elements: `per_element` numbers of a type it has. Without `op` they are only moved.
struct Elements {
  abi::DataType type = abi::kUint8;
  std::uint64_t per_element = 1;
  abi::RedOp op = abi::kSum;
};

abi::DataType type_of(DType number) {
  constexpr abi::DataType kTypes[] = {abi::kFloat32, abi::kFloat64, abi::kFloat16, abi::kBfloat16,
                                      abi::kInt8,    abi::kUint8,   abi::kInt32,   abi::kInt64};
  static_assert(sizeof(kTypes) / sizeof(kTypes[0]) == kNumNumberTypes);
  return kTypes[static_cast<int>(number)];
}

Elements moved(DType dtype) {
  if (static_cast<int>(dtype) < kNumNumberTypes) return {.type = type_of(dtype)};
  return {.per_element = size_of(dtype)};
}

/// Throws std::invalid_argument where the operator has no meaning.
Elements reduced(DType dtype, ReduceOp op) {
  constexpr abi::RedOp kOps[] = {abi::kSum, abi::kAvg, abi::kMin, abi::kMax, abi::kProd};
  static_assert(sizeof(kOps) / sizeof(kOps[0]) == kNumReduceOps);
  const Arithmetic numbers = arithmetic_of(dtype, op);
  return {type_of(numbers.dtype), numbers.per_element, kOps[static_cast<int>(numbers.op)]};
}

/// The first result that stops a group from growing.
bool stops(abi::Result result) { return result != abi::kSuccess && result != abi::kInProgress; }

const std::byte* at(const void* data, std::uint64_t element, DType dtype) {
  return static_cast<const std::byte*>(data) + element * size_of(dtype);
}
std::byte* at(void* data, std::uint64_t element, DType dtype) {
  return static_cast<std::byte*>(data) + element * size_of(dtype);
}

/// One collective of NCCL's: with a configuration of its own where the call has a budget.
template <class Plain, class Configured, class... Arguments>
abi::Result with_budget(int max_ctas, Plain plain, Configured configured, Arguments... arguments) {
  if (max_ctas == 0) return plain(arguments...);
  abi::CollConfig config;
  config.max_ctas = max_ctas;
  return configured(arguments..., &config);
}

/// `move(part, element, count)` of every part that has elements, until a result stops the group.
template <class Move>
abi::Result for_each_part(const Parts& parts, const Move& move) {
  abi::Result result = abi::kSuccess;
  for (int part = 0; part < parts.num_parts() && !stops(result); ++part) {
    if (parts.count(part) != 0) result = move(part, parts.start(part), parts.count(part));
  }
  return result;
}

bool reduces(OpKind kind) {
  return kind == OpKind::kAllReduce || kind == OpKind::kReduce || kind == OpKind::kReduceScatter ||
         kind == OpKind::kScan;
}

}  // namespace

OperationPtr Communicator::submit(const Call& call, const Operands& operands, const CallOptions& options) {
  const std::lock_guard issuing(issuing_);
  check_not_aborted(call);
  return enqueue(call, log_.add(call), options, [&](abi::Comm* comm, abi::Stream stream) {
    return put(call, operands, options.max_ctas, comm, stream);
  });
}

abi::Result Communicator::put(const Call& call, const Operands& operands, int max_ctas, abi::Comm* comm,
                              abi::Stream stream) const {
  const Library& nccl = *library_;
  const Elements elements = reduces(call.kind) ? reduced(call.dtype, call.reduce_op) : moved(call.dtype);
  const void* const input = operands.input;
  void* const output = operands.output;
  const auto numbers = [&](std::uint64_t count) { return count * elements.per_element; };
  const auto send = [&](const void* data, std::uint64_t count, int peer) {
    return nccl.send(data, numbers(count), elements.type, peer, comm, stream);
  };
  const auto recv = [&](void* data, std::uint64_t count, int peer) {
    return nccl.recv(data, numbers(count), elements.type, peer, comm, stream);
  };
  const auto reduce = [&](const void* from, void* to, std::uint64_t count, int root) {
    return with_budget(max_ctas, nccl.reduce, nccl.reduce_config, from, to, numbers(count), elements.type, elements.op,
                       root, comm, stream);
  };
  const auto broadcast = [&](const void* from, void* to, std::uint64_t count, int root) {
    return with_budget(max_ctas, nccl.broadcast, nccl.broadcast_config, from, to, numbers(count), elements.type, root,
                       comm, stream);
  };
  switch (call.kind) {
    case OpKind::kBarrier:
      return nccl.all_reduce(input, output, 1, abi::kUint8, abi::kSum, comm, stream);
    case OpKind::kAllReduce:
      return with_budget(max_ctas, nccl.all_reduce, nccl.all_reduce_config, input, output, numbers(call.count),
                         elements.type, elements.op, comm, stream);
    case OpKind::kScan:  // input: what each rank gives to each rank's prefix, one after the other
      return nccl.reduce_scatter(input, output, numbers(call.count), elements.type, elements.op, comm, stream);
    case OpKind::kBroadcast:
      return broadcast(input, output, call.count, call.root);
    case OpKind::kReduce:
      return reduce(input, output, call.count, call.root);
    case OpKind::kReduceScatter: {
      const Parts& parts = operands.input_parts;
      if (call.splits == 0) {
        return with_budget(max_ctas, nccl.reduce_scatter, nccl.reduce_scatter_config, input, output,
                           numbers(parts.count(0)), elements.type, elements.op, comm, stream);
      }
      return grouped([&] {
        return for_each_part(parts, [&](int owner, std::uint64_t start, std::uint64_t count) {
          return reduce(at(input, start, call.dtype), owner == rank_ ? output : nullptr, count, owner);
        });
      });
    }
    case OpKind::kAllGather: {
      const Parts& parts = operands.output_parts;
      if (call.splits == 0) {
        return with_budget(max_ctas, nccl.all_gather, nccl.all_gather_config, input, output, numbers(parts.count(0)),
                           elements.type, comm, stream);
      }
      return grouped([&] {
        return for_each_part(parts, [&](int owner, std::uint64_t start, std::uint64_t count) {
          void* const to = at(output, start, call.dtype);
          return broadcast(owner == rank_ ? input : to, to, count, owner);
        });
      });
    }
    case OpKind::kAllToAll:
      return grouped([&] {
        const auto out = [&](int peer, std::uint64_t start, std::uint64_t count) {
          return send(at(input, start, call.dtype), count, peer);
        };
        const auto in = [&](int peer, std::uint64_t start, std::uint64_t count) {
          return recv(at(output, start, call.dtype), count, peer);
        };
        const abi::Result sent = for_each_part(operands.input_parts, out);
        return stops(sent) ? sent : for_each_part(operands.output_parts, in);
      });
    case OpKind::kGather:
    case OpKind::kScatter: {  // every rank's part, and all of them at the root
      const bool to_root = call.kind == OpKind::kGather;
      const Parts& parts = to_root ? operands.output_parts : operands.input_parts;
      const auto place = [&](int rank) {
        return at(to_root ? output : const_cast<void*>(input), parts.start(rank), call.dtype);
      };
      void* const part = to_root ? const_cast<void*>(input) : output;
      const bool in_place = rank_ == call.root && part == place(rank_);
      const auto move = [&](bool sends, void* data, int peer) {
        return sends ? send(data, parts.count(peer), peer) : recv(data, parts.count(peer), peer);
      };
      return grouped([&] {
        if (call.count == 0) return abi::kSuccess;
        const abi::Result mine = in_place ? abi::kSuccess : move(to_root, part, call.root);
        if (rank_ != call.root || stops(mine)) return mine;
        return for_each_part(parts, [&](int peer, std::uint64_t, std::uint64_t) {
          return peer == rank_ && in_place ? abi::kSuccess : move(!to_root, place(peer), peer);
        });
      });
    }
    default:
      throw Error(ErrorKind::kGeneral, describe(call) + " is no collective of NCCL's");
  }
}

OperationPtr Communicator::exchange(std::span<const Message> messages, const CallOptions& options) {
  const std::lock_guard issuing(issuing_);
  for (const Message& message : messages) {
    check_not_aborted(message.call);
    log_.add_message(message.call);
  }
  const Call first = messages.empty() ? Call{} : messages.front().call;
  return enqueue(first, 0, options, [&](abi::Comm* comm, abi::Stream stream) {
    return grouped([&] {
      abi::Result result = abi::kSuccess;
      for (const auto& [call, data] : messages) {
        const Elements elements = moved(call.dtype);
        const std::uint64_t count = call.count * elements.per_element;
        result = call.kind == OpKind::kSend ? library_->send(data, count, elements.type, call.root, comm, stream)
                                            : library_->recv(data, count, elements.type, call.root, comm, stream);
        if (stops(result)) break;
      }
      return result;
    });
  });
}

}  // namespace pycomm::nccl
