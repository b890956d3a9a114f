"""Takes leases of filelock as the bench asks for it, a line at a time, and answers in nanoseconds.

SoftFileLease is the class of filelock that is most like a lease of lockkit: its record expires unless the holder's
heartbeat renews it, and a dead owner's is taken over. It has the same times here as lockkit's has by default.
"""

import sys
from time import perf_counter_ns

import filelock


def lease(path):
    return filelock.SoftFileLease(path, lease_duration=3.0, heartbeat_interval=0.25)


def cycles(path, count):
    """Acquires and releases one lease so many times."""
    one = lease(path)
    start = perf_counter_ns()
    for _ in range(count):
        one.acquire()
        one.release()
    return (perf_counter_ns() - start,)


def many(directory, count):
    """Acquires so many leases, and then releases them."""
    leases = [lease(f"{directory}/{number}") for number in range(count)]
    start = perf_counter_ns()
    for one in leases:
        one.acquire()
    acquired = perf_counter_ns()
    for one in leases:
        one.release()
    return acquired - start, perf_counter_ns() - acquired


print(filelock.__version__, flush=True)
for line in sys.stdin:
    what, count, path = line.rstrip("\n").split(" ", 2)
    print(*{"cycles": cycles, "many": many}[what](path, int(count)), flush=True)
