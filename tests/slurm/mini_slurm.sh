#!/usr/bin/env bash
# A real Slurm cluster on one machine: slurmctld, munged and a slurmd per node, for tests.
#
#   mini_slurm.sh DIR NODES GPUS     until the standard input ends; GPUs per node, in name only
#   mini_slurm.sh crash DIR N        on the login node: power node N off, with all its processes
#   mini_slurm.sh boot DIR N         on the login node: power it on again
#
# Every node has its own process table, host name, address, /dev/shm and node-local disk (/mnt), so
# that "localhost" means another place on each of them; the other files are shared, as on a cluster.
# Nothing outside DIR is touched: no /etc, no address or port of the host. The cluster is one process
# with its namespaces: when that ends, all of it is gone. DIR/running appears when it is up.
#
# Needs root and, on Debian: slurmctld slurmd slurm-client munge iproute2 util-linux procps.
# Written for Slurm 22.05; DIR must be short, because a socket's path may have about 100 characters.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

SELF=$(readlink -f "${BASH_SOURCE[0]}")
NET=10.77.0
NAMESPACES=(--mount --uts --net --pid --fork --kill-child --mount-proc)

wait_for() { # COMMAND...: for at most 20 seconds
    local tries
    for ((tries = 0; tries < 400; tries++)); do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.05
    done
    echo "mini_slurm: waited in vain for: $*" >&2
    return 1
}

main() {
    local dir=$1 nodes=$2 gpus=$3
    mkdir -p "$dir"/{run,log,state,spool}
    (umask 077 && head -c 1024 /dev/urandom >"$dir/run/munge.key")
    write_configuration "$dir" "$nodes" "$gpus"
    export SLURM_CONF=$dir/slurm.conf
    exec unshare "${NAMESPACES[@]}" "$SELF" __login "$dir" "$nodes"
}

write_configuration() {
    local dir=$1 nodes=$2 gpus=$3 n
    sed -e "s|@DIR@|$dir|g; s|@NET@|$NET|g; s|@NODES@|$nodes|g; s|@GPUS@|$gpus|g" \
        "$(dirname "$SELF")/slurm.conf.in" >"$dir/slurm.conf"
    echo "AutoDetect=off" >"$dir/gres.conf"
    for ((n = 0; n < gpus; n++)); do
        mknod "$dir/run/gpu$n" c 1 3 # as /dev/null: Slurm wants a device to count
        echo "Name=gpu File=$dir/run/gpu$n" >>"$dir/gres.conf"
    done
    printf '127.0.0.1 localhost\n%s login\n' "$NET.254" >"$dir/hosts"
    for ((n = 1; n <= nodes; n++)); do
        echo "$NET.$n node$n" >>"$dir/hosts"
    done
}

# The first process of the cluster: the login node, with the controller and the network's bridge.
login() {
    local dir=$1 nodes=$2 n
    mount --make-rprivate /
    mount --bind "$dir/hosts" /etc/hosts
    hostname login
    ip link set lo up
    ip link add br0 type bridge
    ip addr add "$NET.254/24" dev br0
    ip link set br0 up
    # --force: the folders above the socket may be private to their owner
    munged --foreground --force --num-threads=2 --key-file="$dir/run/munge.key" \
        --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
        --seed-file="$dir/run/munge.seed" --log-file="$dir/log/munged.log" &
    wait_for munge --no-input --socket="$dir/run/munge.sock"
    slurmctld -D &
    for ((n = 1; n <= nodes; n++)); do
        boot "$dir" "$n"
    done
    wait_for all_idle "$nodes"
    touch "$dir/running"
    cat >/dev/null
}

all_idle() {
    [[ $(sinfo --noheader --partition=main --Node --format=%t | grep -c '^idle$') == "$1" ]]
}

boot() {
    local dir=$1 n=$2 pid first
    setsid unshare "${NAMESPACES[@]}" "$SELF" __node "$dir" "$n" </dev/null \
        >>"$dir/log/node$n.out" 2>&1 &
    pid=$!
    echo "$pid" >"$dir/run/node$n.pid"
    wait_for pgrep --parent "$pid"
    first=$(pgrep --parent "$pid")
    # of a node that has crashed; it may be gone already
    ip link delete "veth$n" 2>/dev/null || true
    # always the same hardware address: the other nodes remember it
    ip link add "veth$n" type veth peer name eth0 \
        address "02:00:00:00:00:$(printf %02x "$n")" netns "$first"
    ip link set "veth$n" master br0 up
}

crash() {
    kill -KILL "$(<"$1/run/node$2.pid")" # --kill-child: what runs on it goes with it
}

# The first process of a compute node.
node() {
    local dir=$1 n=$2
    hostname "node$n"
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /mnt
    ip link set lo up
    wait_for ip link show eth0
    ip addr add "$NET.$n/24" dev eth0
    ip link set eth0 up
    mkdir -p "$dir/spool/node$n"
    slurmd -D -N "node$n" & # not exec: the first process has to reap the tasks that end
    wait $!
}

case $1 in
    crash | boot) "$@" ;;
    __login) login "${@:2}" ;;
    __node) node "${@:2}" ;;
    *) main "$@" ;;
esac
