#!/bin/sh
# Makes docs/single-instance.svg anew: the example is run, twice and then killed, in a pseudo-terminal, and what stands
# on the screen is drawn. Needs cargo and Python 3. Pids are told by their order and moments as one fixed moment, so
# that the picture only changes with what the example says.
set -eu
cd "$(dirname "$0")/../.."
cargo build -q -p lockkit-examples --example single_instance
target=$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
python3 docs/picture/draw.py "$target/debug/examples/single_instance" > docs/single-instance.svg.new
mv docs/single-instance.svg.new docs/single-instance.svg
