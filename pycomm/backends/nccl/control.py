"""The groups of the same ranks on the host that stand beside an NCCL communicator."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pycomm.backends import Backend
from pycomm.backends.gloo import HostsBackend
from pycomm.backends.shm import ShmBackend
from pycomm.rendezvous import Rendezvous

__all__ = ["groups_on_the_host"]


def groups_on_the_host(
    rendezvous: Rendezvous, hosts: Sequence[Hashable], group: str
) -> tuple[Backend | None, Backend | None]:
    """The control group, which is the watchdog's alone, and the desk, for what ranks agree on in calls.

    Shared memory on one host, gloo between several; None in a world of one.

    Args:
        hosts: by rank, the host by any name.
        group: the communicator's name.
    """
    if rendezvous.world_size == 1:
        return None, None
    name = f"{group} (watchdog)"
    control: Backend
    if len(set(hosts)) == 1:
        control = ShmBackend.connect(rendezvous, name, False)
    else:
        control = HostsBackend.connect("gloo+shm", rendezvous, hosts, name, False)
    return control, control.split(0, rendezvous.rank, rendezvous.timeout_s)
