#!/usr/bin/env bash
# crash.sh DIR NODE: end a node and everything that runs on it, as a power failure does. start.sh brings it back.
set -euo pipefail
kill -s KILL "$(cat "${1:?crash.sh DIR NODE}/run/${2:?crash.sh DIR NODE}.pid")"
