"""Virtual CPU devices, which try a mesh on a machine without accelerators."""

import os
import re
from collections.abc import MutableMapping

_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_THREADS_PER_DEVICE = 8


def enlarge_thread_pool(environment: MutableMapping[str, str] = os.environ) -> None:
    """Gives XLA enough threads to run the collectives of virtual CPU devices. Call it before JAX uses its devices.

    In a collective, the thread of each device waits for those of the others. XLA's CPU client runs the collectives of
    all devices in one pool, with one thread per device. A program whose loops over layers do not depend on each other,
    such as a teacher's and a student's, can run several collectives of one device at once. They may then take all
    threads and wait for devices that have none left: the program never ends, and XLA aborts the process after 40 s.
    XLA reads the size of the pool from NPROC, if it is set.
    """
    found = _COUNT.search(environment.get("XLA_FLAGS", ""))
    text = environment.get("JAX_NUM_CPU_DEVICES", "") if found is None else found[1]
    if text.isdecimal() and int(text) > 1:
        environment.setdefault("NPROC", str(_THREADS_PER_DEVICE * int(text)))
