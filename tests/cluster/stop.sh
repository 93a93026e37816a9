#!/usr/bin/env bash
# stop.sh DIR: end the jobs and the daemons of the cluster that start.sh started with this DIR; nothing else.
set -euo pipefail
DIR=$(cd "${1:?stop.sh DIR}" 2>/dev/null && pwd) || exit 0

gone() { # whether no process has this id; one that nobody has waited for yet is gone
  local state
  state=$(sed 's/.*) \(.\).*/\1/' "/proc/$1/stat" 2>/dev/null) || return 0
  [ "$state" = Z ]
}

# Nodes first and at once, with all that runs on them: no job outlives its cluster, and none is asked to save.
for daemon in cn1 cn2 gn1 gn2 slurmctld munged; do
  file=$DIR/run/$daemon.pid
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  program=$daemon signal=TERM
  case $daemon in cn? | gn?) program=unshare signal=KILL ;; esac
  rm -f "$file"
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = $program ] || continue # ended; its id may be another program's
  kill -s $signal "$pid"
  for _ in $(seq 100); do
    gone "$pid" && break
    sleep 0.05
  done
  gone "$pid" || kill -s KILL "$pid"
done
rm -rf "$DIR/state" "$DIR/spool" # jobs that are queued end with the cluster
