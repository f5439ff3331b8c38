#include "nccl/window.hpp"

#include <utility>

namespace pycomm::nccl {

namespace {

constexpr double kWindowPatienceS = 5;  // with giving one back

}  // namespace

void* Communicator::allocate_for_window(std::size_t bytes) {
  if (!library_->has_windows()) {
    throw Error(ErrorKind::kUnavailable, "NCCL at " + library_->file() + " is " + version_text(library_->version()) +
                                             "; its windows can be used from 2.29 on");
  }
  const driver::Context::Current current(device_->context);
  void* memory = nullptr;
  const abi::Result result = library_->mem_alloc(&memory, bytes);
  if (result == abi::kSuccess) return memory;
  throw Error(ErrorKind::kOutOfMemory,
              "ncclMemAlloc of " + std::to_string(bytes) + " bytes: " + library_->describe(result, nullptr));
}

abi::Window Communicator::register_window(void* memory, std::size_t bytes, double timeout_s) {
  const std::lock_guard issuing(issuing_);
  const driver::Context::Current current(device_->context);
  drop_retired_windows();
  opening_ = nullptr;
  invoke("ncclCommWindowRegister", Deadline::after(timeout_s), [&](abi::Comm* comm) {
    return library_->comm_window_register(comm, memory, bytes, &opening_, abi::kWindowCollectiveSymmetric);
  });
  return std::exchange(opening_, nullptr);
}

void* Communicator::peer_address(abi::Window window, int rank) {
  const driver::Context::Current current(device_->context);
  void* address = nullptr;
  const abi::Result result = library_->get_peer_device_pointer(window, 0, rank, &address);
  if (result == abi::kSuccess) return address;
  throw Error(ErrorKind::kUnavailable,
              "ncclGetPeerDevicePointer of rank " + std::to_string(rank) + ": " + library_->describe(result, nullptr));
}

void Communicator::retire_window(abi::Window window, void* memory) {
  const std::lock_guard retiring(retiring_);
  retired_.emplace_back(window, memory);
}

void Communicator::drop_retired_windows() {
  std::vector<std::pair<abi::Window, void*>> retired;
  {
    const std::lock_guard retiring(retiring_);
    retired.swap(retired_);
  }
  for (const auto& [window, memory] : retired) {
    if (window != nullptr && !aborted()) {
      invoke("ncclCommWindowDeregister", Deadline::after(kWindowPatienceS),
             [&, window = window](abi::Comm* comm) { return library_->comm_window_deregister(comm, window); });
    }
    library_->mem_free(memory);
  }
}

Window::Window(std::shared_ptr<Communicator> communicator, std::size_t bytes)
    : communicator_(std::move(communicator)), bytes_(bytes), memory_(communicator_->allocate_for_window(bytes)) {}

Window::~Window() { communicator_->retire_window(window_, memory_); }

void Window::open(double timeout_s) {
  window_ = communicator_->register_window(memory_, bytes_, timeout_s);
  if (window_ == nullptr) {
    throw Error(ErrorKind::kUnavailable, "ncclCommWindowRegister does nothing here: NCCL has no symmetric memory");
  }
  std::vector<std::byte*> parts;
  for (int rank = 0; rank < communicator_->world_size(); ++rank) {
    void* const address = rank == communicator_->rank() ? memory_ : communicator_->peer_address(window_, rank);
    if (address == nullptr) {
      throw Error(ErrorKind::kUnavailable, "NCCL's window of rank " + std::to_string(rank) +
                                               " is not mapped here: the two GPUs are not in one NVLink domain");
    }
    parts.push_back(static_cast<std::byte*>(address));
  }
  parts_ = std::move(parts);
}

}  // namespace pycomm::nccl
