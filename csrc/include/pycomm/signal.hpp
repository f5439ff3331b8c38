// Flags in shared memory: 64-bit epochs that only grow, each written by one rank and read by all.
//
// Ordering. A rank writes its data, then its flag; a peer reads the flag, then the data. The flag's store is at least a
// release and its load at least an acquire, so what came before the store is seen after the load. They are in fact
// sequentially consistent, for one reason only: a waiter announces that it goes to sleep (a store) and then looks at
// the flag (a load), while the signaller stores the flag and then looks for sleepers. Release and acquire would let
// both miss each other (store-load reordering), and the waiter would sleep until its next look, 50 ms later. On x86
// this costs one locked instruction a signal and nothing a load.
#pragma once

#include <atomic>
#include <cstdint>

namespace pycomm {

inline constexpr std::size_t kCacheLine = 64;

// Weakened only by the test that shows that ThreadSanitizer would see it (tests/sanitize).
#ifndef PYCOMM_FLAG_STORE_ORDER
#define PYCOMM_FLAG_STORE_ORDER seq_cst
#endif

template <class T>
T load_flag(const T& flag) {
  return std::atomic_ref<T>(const_cast<T&>(flag)).load(std::memory_order_seq_cst);
}

template <class T>
void store_flag(T& flag, T value) {
  static_assert(std::atomic_ref<T>::is_always_lock_free, "a lock would be private to one process");
  std::atomic_ref<T>(flag).store(value, std::memory_order::PYCOMM_FLAG_STORE_ORDER);
}

/// For what is only read to tell people: ordered after what came before, no more.
template <class T>
void store_note(T& note, T value) {
  std::atomic_ref<T>(note).store(value, std::memory_order_release);
}

template <class T>
T add_flag(T& flag, T value) {
  return std::atomic_ref<T>(flag).fetch_add(value, std::memory_order_seq_cst);
}

}  // namespace pycomm
