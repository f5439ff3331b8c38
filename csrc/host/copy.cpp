#include "host/copy.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace pycomm::host {

void copy(void* to, const void* from, std::size_t bytes, bool around_caches) {
  if (bytes == 0) return;  // the pointers may be null
  auto* target = static_cast<std::byte*>(to);
  const auto* source = static_cast<const std::byte*>(from);
#if defined(__x86_64__)
  constexpr std::size_t kLine = 64;
  if (around_caches && bytes >= 2 * kLine) {
    const std::size_t head = (kLine - reinterpret_cast<std::uintptr_t>(to) % kLine) % kLine;
    std::memcpy(target, source, head);
    std::size_t done = head;
    for (; bytes - done >= kLine; done += kLine) {  // whole lines: they are written as such
      auto* const to_line = reinterpret_cast<__m128i*>(target + done);
      const auto* const from_line = reinterpret_cast<const __m128i*>(source + done);
      for (std::size_t i = 0; i < kLine / sizeof(__m128i); ++i) {
        _mm_stream_si128(to_line + i, _mm_loadu_si128(from_line + i));
      }
    }
    std::memcpy(target + done, source + done, bytes - done);
    return _mm_sfence();  // a flag's release does not order non-temporal stores
  }
#else
  static_cast<void>(around_caches);
#endif
  std::memcpy(target, source, bytes);
}

}  // namespace pycomm::host
