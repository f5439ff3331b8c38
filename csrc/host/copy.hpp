// Copies of a message's bytes, past the caches where the message is too large for them.
#pragma once

#include <cstddef>

namespace pycomm::host {

/// As memcpy. `around_caches`: with non-temporal stores, so that the processor need not read the lines that it
/// overwrites, and drops nothing for them; they have reached memory when it returns, so a flag may follow.
void copy(void* to, const void* from, std::size_t bytes, bool around_caches);

}  // namespace pycomm::host
