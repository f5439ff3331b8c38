#include "host/bootstrap.hpp"

namespace pycomm::host {

std::uint64_t build_id() { return PYCOMM_BUILD_ID; }  // a hash of the sources (cmake/sources.cmake)

}  // namespace pycomm::host
