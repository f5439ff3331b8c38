// A stand-in for NCCL and for the part of the CUDA driver that csrc/nccl uses, over the host's memory: the same code
// runs on CPU tensors, with the rules that make NCCL programs hang. For tests only.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "nccl/abi.hpp"

/// A thread that runs one thing after the other.
struct CUstream_st {
  CUstream_st();
  void push(std::function<void()> work);

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::thread thread_;
};
