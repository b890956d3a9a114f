#!/bin/sh
# Lists what the documentation of lockkit's public items lacks; prints nothing and ends well when that is nothing. Needs
# Python 3.
set -eu
cd "$(dirname "$0")/.."
# rustdoc alone is told that it may write JSON: cargo would build every dependency anew.
rustdoc=$(mktemp)
trap 'rm -f "$rustdoc"' EXIT
printf '#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec rustdoc "$@"\n' > "$rustdoc"
chmod +x "$rustdoc"
RUSTDOC=$rustdoc cargo rustdoc -q -p lockkit --lib --all-features -- -Z unstable-options --output-format json
python3 docs/items.py "${CARGO_TARGET_DIR:-target}/doc/lockkit.json"
