// Flags that streams set and wait for without a kernel ("stream memory operations"), in memory that the device maps.
//
// set_flag comes after what its stream did before, all of it visible to whoever sees the flag: the driver puts a fence
// of system scope before the store (no CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER here). What a stream does after
// await_flag comes after the flag was seen. Values wrap around: `flag` has reached `value` if it is at most 2^31 - 1
// ahead of it (CU_STREAM_WAIT_VALUE_GEQ). A wait has no deadline of its own: whoever enqueues one sees to it that the
// flag is set in the end (OverlappedMatmul::wait).
#pragma once

#include <cstdint>

#include "cuda/kernels/launch.hpp"

namespace pycomm::cuda {

void set_flag(Stream stream, std::uint32_t* flag, std::uint32_t value);
void await_flag(Stream stream, std::uint32_t* flag, std::uint32_t value);

}  // namespace pycomm::cuda
