#!/bin/sh
# Prints the path of a python that has the packages redis and python-redis-lock: that of a virtual environment in the
# directory $1, which is made by the first call. Needs python3 with venv and pip, and the first time a package index.
set -eu
python=$1/bin/python
if ! "$python" -c 'import redis, redis_lock' 2>/dev/null; then
    python3 -m venv "$1" >&2
    "$python" -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 10 redis python-redis-lock >&2
fi
echo "$python"
