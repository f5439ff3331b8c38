// Barrier: the matched entry of a call is one. Steps: 1 (each rank writes its slot and reads the others').
#include "host/barrier.hpp"

namespace pycomm::host {

void barrier(Group& group) { const Entry entry(group, Call{.kind = OpKind::kBarrier}); }

}  // namespace pycomm::host
