// Loads and stores of eight neighbouring elements, in 16-byte pieces where the address allows, and copies of bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm::cuda {

inline constexpr int kGroup = 8;  // elements that a thread handles at a time: 16 bytes of the 16-bit types
inline constexpr int kVecBytes = 16;

template <class T>
inline constexpr int kPiece = kVecBytes / sizeof(T) < kGroup ? kVecBytes / sizeof(T) : kGroup;

/// What one instruction moves: 16 bytes, or 8 where eight elements are no more.
template <class T>
struct alignas(sizeof(T) * kPiece<T>) Piece {
  T at[kPiece<T>];
};

template <class T>
struct Elements {
  T at[kGroup];
};

__device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kVecBytes == 0;
}

/// Elements [0, num) at `from`; the rest is undefined. num is 1 to kGroup.
template <class T>
__device__ inline Elements<T> load(const T* from, int num) {
  Elements<T> result;
  if (num == kGroup && is_aligned(from)) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kPiece<T>) {
      const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(from + i);
#pragma unroll
      for (int k = 0; k < kPiece<T>; ++k) result.at[i + k] = piece.at[k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) result.at[i] = i < num ? from[i] : T{};
  }
  return result;
}

template <class T>
__device__ inline void store(T* to, const Elements<T>& values, int num) {
  if (num == kGroup && is_aligned(to)) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kPiece<T>) {
      Piece<T> piece;
#pragma unroll
      for (int k = 0; k < kPiece<T>; ++k) piece.at[k] = values.at[i + k];
      *reinterpret_cast<Piece<T>*>(to + i) = piece;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < num) to[i] = values.at[i];
    }
  }
}

/// to[k][0 … bytes) = from, by threads `thread` of `num_threads`; each byte is read once. Where all addresses lie alike
/// to 16 bytes, whole 16-byte pieces move and only the ends go byte by byte.
template <int kMaxTargets>
__device__ inline void copy_bytes(std::byte* const (&to)[kMaxTargets], int num_to, const std::byte* from,
                                  std::int64_t bytes, int thread, int num_threads) {
  const auto misaligned = [](const std::byte* p) { return reinterpret_cast<std::uintptr_t>(p) % kVecBytes; };
  bool alike = true;
  for (int k = 0; k < num_to; ++k) alike = alike && misaligned(to[k]) == misaligned(from);
  std::int64_t head = static_cast<std::int64_t>((kVecBytes - misaligned(from)) % kVecBytes);
  if (!alike || head > bytes) head = bytes;
  const std::int64_t num_pieces = (bytes - head) / kVecBytes;
  for (std::int64_t i = thread; i < num_pieces; i += num_threads) {
    const std::int64_t at = head + i * kVecBytes;
    const auto piece = *reinterpret_cast<const Piece<std::uint32_t>*>(from + at);
    for (int k = 0; k < num_to; ++k) *reinterpret_cast<Piece<std::uint32_t>*>(to[k] + at) = piece;
  }
  const std::int64_t middle = num_pieces * kVecBytes;
  for (std::int64_t i = thread; i < bytes - middle; i += num_threads) {
    const std::int64_t at = i < head ? i : i + middle;
    const std::byte value = from[at];
    for (int k = 0; k < num_to; ++k) to[k][at] = value;
  }
}

/// The part [begin, end) of `count` things that is `index`'s among `num`. Starts are multiples of `unit`.
struct Part {
  std::int64_t begin, end;
};
__host__ __device__ inline Part part_of(std::int64_t count, std::int64_t unit, int index, int num) {
  const std::int64_t units = (count + unit - 1) / unit;
  const auto start = [=](std::int64_t i) {
    const std::int64_t at = (units / num * i + (units % num < i ? units % num : i)) * unit;
    return at < count ? at : count;
  };
  return {start(index), start(index + 1)};
}

}  // namespace pycomm::cuda
