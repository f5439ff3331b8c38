#include "nccl/communicator.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

namespace pycomm::nccl {

namespace {

constexpr double kPatienceS = 5;  // of an abort with a thread that is inside NCCL, and with NCCL's own farewell
constexpr auto kInterruptEvery = std::chrono::milliseconds(50);

bool is_fine(abi::Result result) { return result == abi::kSuccess || result == abi::kInProgress; }

}  // namespace

bool Operation::reach(double timeout_s, InterruptCheck interrupt) const {
  const Deadline deadline = Deadline::after(timeout_s);
  auto looked = Deadline::Clock::now();
  Backoff backoff;
  while (!done()) {
    const auto now = Deadline::Clock::now();
    if (deadline.expired(now)) return false;
    if (interrupt != nullptr && now - looked > kInterruptEvery) {
      interrupt();
      looked = now;
    }
    backoff.pause();
  }
  return true;
}

Communicator::Communicator(std::shared_ptr<const Library> library, std::shared_ptr<const Device> device, int rank,
                           int world_size, InterruptCheck interrupt)
    : library_(std::move(library)),
      device_(std::move(device)),
      rank_(rank),
      world_size_(world_size),
      interrupt_(interrupt),
      kernels_(device_->context) {
  const driver::Context::Current current(device_->context);
  stream_ = std::make_unique<driver::Stream>(device_->context);
  entry_ = std::make_unique<driver::Event>(*device_->driver);
}

Communicator::~Communicator() {
  try {
    abort();
    const driver::Context::Current current(device_->context);
    drop_retired_windows();
    in_flight_.clear();
    latest_ = {};
    entry_.reset();
    stream_.reset();
  } catch (const Error&) {  // the device has failed: nothing of it can be given back
  }
}

void Communicator::connect(const abi::UniqueId& id, double timeout_s) {
  const std::lock_guard issuing(issuing_);
  const driver::Context::Current current(device_->context);
  abi::Config config;
  abi::Result result = abi::kSuccess;
  {
    const std::lock_guard calling(calling_);
    result = library_->comm_init_rank_config(&comm_, world_size_, id, rank_, &config);
  }
  settle("ncclCommInitRankConfig", result, Deadline::after(timeout_s), comm_);
}

std::unique_ptr<Communicator> Communicator::split(std::optional<int> color, int rank, int world_size,
                                                  double timeout_s) {
  const std::lock_guard issuing(issuing_);
  const driver::Context::Current current(device_->context);
  const Deadline deadline = Deadline::after(timeout_s);
  auto part = color ? std::make_unique<Communicator>(library_, device_, rank, world_size, interrupt_) : nullptr;
  invoke("ncclCommSplit", deadline, [&](abi::Comm* comm) {
    return library_->comm_split(comm, color.value_or(abi::kNoColor), rank, &child_, nullptr);
  });
  if (!part) return nullptr;
  part->comm_ = std::exchange(child_, nullptr);
  part->settle("ncclCommSplit", abi::kInProgress, deadline, part->comm_);
  return part;
}

OperationPtr Communicator::enqueue(const Call& call, std::uint64_t seq, const CallOptions& options, const Body& body) {
  return enqueue_on_stream(call, seq, options, [&](const Operation& operation, driver::abi::Stream stream) {
    invoke(describe(call), operation.deadline(), [&](abi::Comm* comm) { return body(comm, stream); });
  });
}

OperationPtr Communicator::submit_kernel(const Call& call, const CallOptions& options, const Launch& launch) {
  const std::lock_guard issuing(issuing_);
  check_not_aborted(call);
  return enqueue_on_stream(call, log_.add(call), options,
                           [&](const Operation&, driver::abi::Stream stream) { launch(stream); });
}

OperationPtr Communicator::enqueue_on_stream(const Call& call, std::uint64_t seq, const CallOptions& options,
                                             const std::function<void(const Operation&, driver::abi::Stream)>& put) {
  const driver::Context::Current current(device_->context);
  auto operation = std::make_shared<Operation>(device_->context, call, seq, options.timeout_s, ended_);
  driver::abi::Stream stream = options.stream;
  if (options.async_op) {
    stream = stream_->get();
    entry_->record(options.stream);
    entry_->make_wait(stream);
  }
  const std::uint64_t capture = device_->driver->capture_of(stream);
  const bool by_kernel = call.route != Route::kBackend;
  // NCCL orders its own calls. Between a graph and what is outside of it only the program can.
  if (latest_.operation && (by_kernel || latest_.by_kernel) && latest_.stream != stream && latest_.capture == capture) {
    latest_.operation->make_wait(stream);
  }
  put(*operation, stream);
  operation->enqueued(stream, capture != 0);
  latest_ = {operation, stream, capture, by_kernel};
  if (capture == 0) {
    const std::lock_guard flying(flying_);
    in_flight_.push_back(operation);
  } else {
    operation->finish(nullptr);
  }
  return operation;
}

void Communicator::check_not_aborted(const Call& call) const {
  if (aborted()) throw Error(ErrorKind::kGeneral, describe(call) + ": the communicator has been aborted");
}

void Communicator::invoke(const std::string& name, const Deadline& deadline,
                          const std::function<abi::Result(abi::Comm*)>& call) {
  abi::Result result = abi::kSuccess;
  {
    const std::lock_guard calling(calling_);
    if (comm_ == nullptr) throw Error(ErrorKind::kGeneral, name + ": the communicator has been aborted");
    result = call(comm_);
  }
  settle(name, result, deadline, comm_);
}

void Communicator::settle(const std::string& name, abi::Result result, const Deadline& deadline,
                          abi::Comm* const& comm) {
  auto looked = Deadline::Clock::now();
  Backoff backoff;
  while (result == abi::kInProgress) {
    const auto now = Deadline::Clock::now();
    if (deadline.expired(now)) {
      throw Error(ErrorKind::kTimeout, name + ": NCCL did not start it within the deadline");
    }
    if (interrupt_ != nullptr && now - looked > kInterruptEvery) {
      interrupt_();
      looked = now;
    }
    {
      const std::lock_guard calling(calling_);
      if (comm == nullptr) throw Error(ErrorKind::kGeneral, name + ": the communicator has been aborted");
      const abi::Result asked = library_->comm_get_async_error(comm, &result);
      if (asked != abi::kSuccess) result = asked;
    }
    if (result == abi::kInProgress) backoff.pause();
  }
  if (result != abi::kSuccess) throw Error(ErrorKind::kGeneral, name + ": " + library_->describe(result, comm));
}

abi::Result Communicator::grouped(const std::function<abi::Result()>& add) const {
  const abi::Result started = library_->group_start();
  if (!is_fine(started)) return started;
  const abi::Result added = add();
  const abi::Result ended = library_->group_end();  // always: the group belongs to the thread
  return is_fine(added) ? ended : added;
}

std::string Communicator::error() {
  try {
    static_cast<void>(unfinished());  // looks at the device
  } catch (const Error& failure) {
    return failure.what();
  }
  std::unique_lock calling(calling_, std::try_to_lock);
  if (!calling || comm_ == nullptr) return "";
  abi::Result result = abi::kSuccess;
  const abi::Result asked = library_->comm_get_async_error(comm_, &result);
  if (asked != abi::kSuccess) result = asked;
  return is_fine(result) ? "" : library_->describe(result, comm_);
}

std::vector<OperationPtr> Communicator::unfinished() {
  std::vector<OperationPtr> passed;
  std::vector<OperationPtr> left;
  {
    const driver::Context::Current current(device_->context);
    const std::lock_guard flying(flying_);
    for (const OperationPtr& operation : in_flight_) (operation->passed() ? passed : left).push_back(operation);
    in_flight_.assign(left.begin(), left.end());
  }
  for (const OperationPtr& operation : passed) operation->finish(nullptr);
  return left;
}

void Communicator::abort() {
  if (ended_->exchange(true)) return;
  try {
    kernels_.stop();
  } catch (const Error&) {  // the device has failed, and its kernels with it
  }
  std::unique_lock calling(calling_, std::defer_lock);
  // A non-blocking communicator keeps nobody long. If it does, only the abort can free that thread.
  static_cast<void>(calling.try_lock_for(std::chrono::duration<double>(kPatienceS)));
  const driver::Context::Current current(device_->context);
  if (abi::Comm* const comm = std::exchange(comm_, nullptr)) library_->comm_abort(comm);
  if (abi::Comm* const child = std::exchange(child_, nullptr)) library_->comm_abort(child);
  std::vector<OperationPtr> ended;
  {
    const std::lock_guard flying(flying_);
    ended.assign(in_flight_.begin(), in_flight_.end());
  }
  for (const OperationPtr& operation : ended) operation->finish(nullptr);
}

bool Communicator::close(double timeout_s) {
  const Deadline deadline = Deadline::after(timeout_s);
  if (aborted()) return true;
  try {
    for (const OperationPtr& operation : unfinished()) {
      const double left_s = std::chrono::duration<double>(deadline.left()).count();
      if (!operation->reach(left_s, interrupt_)) {
        abort();
        return false;
      }
    }
    static_cast<void>(unfinished());
    const std::lock_guard issuing(issuing_);
    const driver::Context::Current current(device_->context);
    const Deadline farewell = Deadline::after(kPatienceS);
    drop_retired_windows();
    invoke("ncclCommFinalize", farewell, [&](abi::Comm* comm) { return library_->comm_finalize(comm); });
    const std::lock_guard calling(calling_);
    ended_->store(true, std::memory_order_release);
    if (abi::Comm* const comm = std::exchange(comm_, nullptr)) library_->comm_destroy(comm);
  } catch (const Error&) {  // it has failed, or a peer has gone without finalizing
    abort();
    return false;
  }
  kernels_.stop();
  return true;
}

}  // namespace pycomm::nccl
