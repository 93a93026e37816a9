#!/usr/bin/env bash
# start.sh DIR: start a Slurm cluster of four nodes on this machine, with everything that it writes under DIR.
#
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#   sudo tests/cluster/start.sh /tmp/cluster
#   source /tmp/cluster/env.sh
#   snakemake --profile slurm all --configfile config/demo.yaml
#   sudo tests/cluster/stop.sh /tmp/cluster
#
# cn1 and cn2 are CPU nodes; gn1 and gn2 have two GPUs each, on which only Slurm believes. What runs already is
# left as it is; a node that crash.sh has ended comes back. Needs root, no systemd, no cgroups.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?start.sh DIR}"
DIR=$(cd "$1" && pwd)
NODES=(cn1 cn2 gn1 gn2)

alive() { # alive DAEMON PROGRAM: whether it runs; its process id may have passed to another program, or to nobody
  [ -s "$DIR/run/$1.pid" ] && [[ $(cat "/proc/$(cat "$DIR/run/$1.pid")/stat" 2>/dev/null) == *" ($2) "[!ZX]* ]]
}

free_ports() { # print the first of five ports in a row that nobody listens on
  local first port
  while :; do
    first=$((26000 + RANDOM % 5000))
    for port in $(seq "$first" $((first + 4))); do
      ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
    done
    echo "$first" && return
  done
}

# ---- files
mkdir -p "$DIR"/{dev,etc,log,munge,run,state} "${NODES[@]/#/$DIR/spool/}" /etc/slurm
chmod 755 "$DIR"
[ -s "$DIR/run/port" ] || free_ports > "$DIR/run/port"
port=$(cat "$DIR/run/port")
for file in slurm.conf gres.conf; do
  sed -e "s|@DIR@|$DIR|g; s|@CONTROLLER@|$port|" \
    -e "s|@CN1@|$((port + 1))|; s|@CN2@|$((port + 2))|; s|@GN1@|$((port + 3))|; s|@GN2@|$((port + 4))|" \
    "$here/$file" > "$DIR/etc/$file"
done
echo "127.0.0.1 localhost $(hostname) ${NODES[*]}" > "$DIR/etc/hosts"
echo "export SLURM_CONF=$DIR/etc/slurm.conf" > "$DIR/env.sh"
source "$DIR/env.sh"
for gpu in 0 1; do
  [ -e "$DIR/dev/nvidia$gpu" ] || mknod -m 666 "$DIR/dev/nvidia$gpu" c 1 3 # another /dev/null
done
[ -s "$DIR/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom > "$DIR/munge/key")

# ---- daemons
# By --force munged also works in a folder that is closed to others, as those of tests are.
alive munged munged || munged --force --key-file="$DIR/munge/key" --socket="$DIR/run/munge.sock" \
  --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed"
alive slurmctld slurmctld || slurmctld

# A node has its own name, its own processes, which all end with it, and its own /etc/slurm: Snakemake's job step
# starts srun without SLURM_CONF. The mounts are seen by the node alone and end with it.
for node in "${NODES[@]}"; do
  alive "$node" unshare && continue
  setsid unshare --uts --mount --propagation slave --pid --fork --kill-child --mount-proc sh -c "
    hostname $node && mount --bind '$DIR/etc' /etc/slurm && mount --bind '$DIR/etc/hosts' /etc/hosts
    slurmd -D -c -N $node & wait" < /dev/null > "$DIR/log/$node.out" 2>&1 &
  echo $! > "$DIR/run/$node.pid"
done

# ---- until all nodes answer
ready() {
  for node in 1 2 3 4; do (exec 3<>"/dev/tcp/127.0.0.1/$((port + node))") 2>/dev/null || return 1; done
  [ "$(sinfo -h -N -p urgent -t idle,mixed,allocated,completing -o %N 2>/dev/null | wc -l)" = 4 ]
}
for _ in $(seq 300); do
  ready && sinfo && exit
  sleep 0.1
done
echo "start.sh: expected four nodes within 30 s; what they said is in $DIR/log" >&2
sinfo -N -o '%N %T %E' >&2
exit 1
