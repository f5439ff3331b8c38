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

std::uint64_t total(const Parts& parts) {
  std::uint64_t sum = 0;
  for (const std::uint64_t count : parts.counts) sum += count;
  return sum;
}

const std::byte* at(const void* data, std::uint64_t element, DType dtype) {
  return static_cast<const std::byte*>(data) + element * size_of(dtype);
}
std::byte* at(void* data, std::uint64_t element, DType dtype) {
  return static_cast<std::byte*>(data) + element * size_of(dtype);
}

abi::CollConfig config_of(const CallOptions& options) {
  abi::CollConfig config;
  config.max_ctas = options.max_ctas;
  return config;
}

/// `plain`, or `configured` where the call has a budget of its own.
template <class Plain, class Configured, class... Arguments>
abi::Result with_budget(const CallOptions& options, Plain plain, Configured configured, Arguments... arguments) {
  if (options.max_ctas == 0) return plain(arguments...);
  const abi::CollConfig config = config_of(options);
  return configured(arguments..., &config);
}

}  // namespace

OperationPtr Communicator::all_reduce(const Buffers& buffers, std::uint64_t count, ReduceOp op,
                                      const CallOptions& options) {
  const Elements elements = reduced(buffers.dtype, op);
  const Call call{.kind = OpKind::kAllReduce, .dtype = buffers.dtype, .reduce_op = op, .count = count};
  return enqueue(call, options, [&](abi::Comm* comm, abi::Stream stream) {
    return with_budget(options, library_->all_reduce, library_->all_reduce_config, buffers.input, buffers.output,
                       count * elements.per_element, elements.type, elements.op, comm, stream);
  });
}

OperationPtr Communicator::all_reduce_by_kernel(Route route, Location place, DType dtype, std::uint64_t count,
                                                ReduceOp op, const CallOptions& options, const Launch& launch) {
  static_cast<void>(arithmetic_of(dtype, op));
  const Call call{.kind = OpKind::kAllReduce,
                  .dtype = dtype,
                  .reduce_op = op,
                  .route = route,
                  .count = count,
                  .splits = place.bits()};
  return by_kernel(call, options, launch);
}

OperationPtr Communicator::barrier(void* byte, const CallOptions& options) {
  return enqueue(Call{.kind = OpKind::kBarrier}, options, [&](abi::Comm* comm, abi::Stream stream) {
    return library_->all_reduce(byte, byte, 1, abi::kUint8, abi::kSum, comm, stream);
  });
}

OperationPtr Communicator::broadcast(const Buffers& buffers, std::uint64_t count, int root,
                                     const CallOptions& options) {
  const Call call{.kind = OpKind::kBroadcast, .dtype = buffers.dtype, .root = root, .count = count};
  const Elements elements = moved(buffers.dtype);
  return enqueue(call, options, [&](abi::Comm* comm, abi::Stream stream) {
    return with_budget(options, library_->broadcast, library_->broadcast_config, buffers.input, buffers.output,
                       count * elements.per_element, elements.type, root, comm, stream);
  });
}

OperationPtr Communicator::reduce(const Buffers& buffers, std::uint64_t count, int root, ReduceOp op,
                                  const CallOptions& options) {
  const Elements elements = reduced(buffers.dtype, op);
  const Call call{.kind = OpKind::kReduce, .dtype = buffers.dtype, .reduce_op = op, .root = root, .count = count};
  return enqueue(call, options, [&](abi::Comm* comm, abi::Stream stream) {
    return with_budget(options, library_->reduce, library_->reduce_config, buffers.input, buffers.output,
                       count * elements.per_element, elements.type, elements.op, root, comm, stream);
  });
}

OperationPtr Communicator::reduce_scatter(const Buffers& buffers, const Parts& parts, ReduceOp op,
                                          const CallOptions& options) {
  const Elements elements = reduced(buffers.dtype, op);
  const Call call{.kind = OpKind::kReduceScatter,
                  .dtype = buffers.dtype,
                  .reduce_op = op,
                  .count = total(parts),
                  .splits = parts.splits};
  return enqueue(call, options, [&](abi::Comm* comm, abi::Stream stream) {
    if (parts.splits == 0) {
      return with_budget(options, library_->reduce_scatter, library_->reduce_scatter_config, buffers.input,
                         buffers.output, parts.counts.front() * elements.per_element, elements.type, elements.op, comm,
                         stream);
    }
    return grouped([&] {
      abi::Result result = abi::kSuccess;
      std::uint64_t start = 0;
      for (int owner = 0; owner < world_size_ && !stops(result); ++owner) {
        const std::uint64_t count = parts.counts[static_cast<std::size_t>(owner)];
        void* const output = owner == rank_ ? buffers.output : nullptr;
        if (count != 0) {
          const void* const input = at(buffers.input, start, buffers.dtype);
          result = with_budget(options, library_->reduce, library_->reduce_config, input, output,
                               count * elements.per_element, elements.type, elements.op, owner, comm, stream);
        }
        start += count;
      }
      return result;
    });
  });
}

OperationPtr Communicator::all_gather(const Buffers& buffers, const Parts& parts, const CallOptions& options) {
  const Elements elements = moved(buffers.dtype);
  const Call call{.kind = OpKind::kAllGather, .dtype = buffers.dtype, .count = total(parts), .splits = parts.splits};
  return enqueue(call, options, [&](abi::Comm* comm, abi::Stream stream) {
    if (parts.splits == 0) {
      return with_budget(options, library_->all_gather, library_->all_gather_config, buffers.input, buffers.output,
                         parts.counts.front() * elements.per_element, elements.type, comm, stream);
    }
    return grouped([&] {
      abi::Result result = abi::kSuccess;
      std::uint64_t start = 0;
      for (int owner = 0; owner < world_size_ && !stops(result); ++owner) {
        const std::uint64_t count = parts.counts[static_cast<std::size_t>(owner)];
        void* const output = at(buffers.output, start, buffers.dtype);
        const void* const input = owner == rank_ ? buffers.input : output;
        if (count != 0) {
          result = with_budget(options, library_->broadcast, library_->broadcast_config, input, output,
                               count * elements.per_element, elements.type, owner, comm, stream);
        }
        start += count;
      }
      return result;
    });
  });
}

OperationPtr Communicator::all_to_all(const Buffers& buffers, const Parts& output, const Parts& input,
                                      const CallOptions& options) {
  const Elements elements = moved(buffers.dtype);
  Call call{.kind = OpKind::kAllToAll, .dtype = buffers.dtype, .splits = output.splits};
  if (output.splits == 0) call.count = total(input);
  return enqueue(call, options, [&](abi::Comm* comm, abi::Stream stream) {
    return grouped([&] {
      abi::Result result = abi::kSuccess;
      std::uint64_t from = 0;
      std::uint64_t to = 0;
      for (int peer = 0; peer < world_size_ && !stops(result); ++peer) {
        const std::uint64_t sent = input.counts[static_cast<std::size_t>(peer)];
        const std::uint64_t received = output.counts[static_cast<std::size_t>(peer)];
        if (sent != 0) {
          result = library_->send(at(buffers.input, from, buffers.dtype), sent * elements.per_element, elements.type,
                                  peer, comm, stream);
        }
        if (received != 0 && !stops(result)) {
          result = library_->recv(at(buffers.output, to, buffers.dtype), received * elements.per_element, elements.type,
                                  peer, comm, stream);
        }
        from += sent;
        to += received;
      }
      return result;
    });
  });
}

OperationPtr Communicator::gather(const Buffers& buffers, std::uint64_t count, int root, const CallOptions& options) {
  return with_root(OpKind::kGather, buffers.input, buffers.output, buffers.dtype, count, root, options);
}

OperationPtr Communicator::scatter(const Buffers& buffers, std::uint64_t count, int root, const CallOptions& options) {
  return with_root(OpKind::kScatter, buffers.output, buffers.input, buffers.dtype, count, root, options);
}

OperationPtr Communicator::with_root(OpKind kind, const void* part, const void* all, DType dtype, std::uint64_t count,
                                     int root, const CallOptions& options) {
  const Elements elements = moved(dtype);
  const Call call{.kind = kind, .dtype = dtype, .root = root, .count = count * static_cast<std::uint64_t>(world_size_)};
  return enqueue(call, options, [&](abi::Comm* comm, abi::Stream stream) {
    const auto move = [&](bool is_send, const void* data, int peer) {
      const std::uint64_t numbers = count * elements.per_element;
      return is_send ? library_->send(data, numbers, elements.type, peer, comm, stream)
                     : library_->recv(const_cast<void*>(data), numbers, elements.type, peer, comm, stream);
    };
    const auto place = [&](int rank) { return at(all, count * static_cast<std::uint64_t>(rank), dtype); };
    const bool to_root = kind == OpKind::kGather;
    return grouped([&] {
      if (count == 0) return abi::kSuccess;
      abi::Result result = abi::kSuccess;
      const bool in_place = rank_ == root && part == place(root);
      if (!in_place) result = move(to_root, part, root);
      if (rank_ != root) return result;
      for (int peer = 0; peer < world_size_ && !stops(result); ++peer) {
        if (peer != root || !in_place) result = move(!to_root, place(peer), peer);
      }
      return result;
    });
  });
}

OperationPtr Communicator::exchange(std::span<const Message> messages, const CallOptions& options) {
  const std::lock_guard issuing(issuing_);
  Call first;
  for (const Message& message : messages) {
    const Call call{.kind = message.is_send ? OpKind::kSend : OpKind::kRecv,
                    .dtype = message.dtype,
                    .root = message.peer,
                    .count = message.count,
                    .splits = static_cast<std::uint64_t>(message.tag)};
    check_not_aborted(call);
    if (first.kind == OpKind::kNone) first = call;
    log_.add_message(call);
  }
  return enqueue_logged(first, 0, options, [&](abi::Comm* comm, abi::Stream stream) {
    return grouped([&] {
      abi::Result result = abi::kSuccess;
      for (const Message& message : messages) {
        const Elements elements = moved(message.dtype);
        const std::uint64_t count = message.count * elements.per_element;
        result = message.is_send ? library_->send(message.data, count, elements.type, message.peer, comm, stream)
                                 : library_->recv(message.data, count, elements.type, message.peer, comm, stream);
        if (stops(result)) break;
      }
      return result;
    });
  });
}

}  // namespace pycomm::nccl
