"""Takes locks on a Redis as the bench asks for it, a line at a time: `peer.py PACKAGE PORT`, where the package is
`redis` (its Lock, which polls) or `redis_lock` (python-redis-lock, which blocks in BLPOP).

Times are nanoseconds of the clock that all processes of the machine share.
"""

import sys
from importlib.metadata import version
from time import monotonic_ns

import redis
import redis_lock

package, port = sys.argv[1:]
server = redis.Redis(port=int(port))


def lock(name):
    if package == "redis":
        return redis.lock.Lock(server, name, timeout=3)
    return redis_lock.Lock(server, name, expire=3)


def cycles(count):
    """Acquires and releases one lock so many times."""
    one = lock("cycles")
    start = monotonic_ns()
    for _ in range(int(count)):
        one.acquire()
        one.release()
    return monotonic_ns() - start


shared = lock("hand-over")


def hold():
    shared.acquire()
    return "held"


def release():
    before = monotonic_ns()
    shared.release()
    return before


def wait():
    shared.acquire()
    acquired = monotonic_ns()
    shared.release()
    return acquired


print(version("redis" if package == "redis" else "python-redis-lock"), flush=True)
for line in sys.stdin:
    what, *arguments = line.split()
    print({"cycles": cycles, "hold": hold, "release": release, "wait": wait}[what](*arguments), flush=True)
