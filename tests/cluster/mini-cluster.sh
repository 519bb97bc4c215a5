#!/usr/bin/env bash
# A real Slurm cluster of several nodes on this machine, as root: munged, slurmctld and a slurmd for each node. Every node has its own
# network, host name, processes and /dev/shm (namespaces), and shares the files.
#
#   mini-cluster.sh install           Debian's packages, where they are missing
#   mini-cluster.sh usable            exit code 0 where it can be started here; else a line that says why not
#   eval "$(mini-cluster.sh start)"   prints `export SLURM_CONF=...` once all nodes are idle
#   mini-cluster.sh stop              cancels the jobs, ends what it started, and only that
#   mini-cluster.sh cut-power NODE    the network goes first, then every process of the node: nobody gets a last packet
#   mini-cluster.sh split NODE        the node's network is gone; its processes go on, and its files stay shared
#   mini-cluster.sh start-node NODE   a node without power or network comes back
#   mini-cluster.sh kill-controller, start-controller
#   mini-cluster.sh exec NODE COMMAND...   on that node
#
# Settings (environment): SLURM_MINI_DIR (state, absolute; /tmp/mini-slurm), SLURM_MINI_PORT (of the controller; 16817),
# SLURM_MINI_NODES (3: node0 node1 node2). A node pretends to have 4 CPUs and 2 GPUs, which are only numbers in
# CUDA_VISIBLE_DEVICES. Partitions: main, and urgent, whose jobs preempt those of main (they are requeued after 20 s of grace).
set -euo pipefail

DIR=${SLURM_MINI_DIR:-/tmp/mini-slurm}
PORT=${SLURM_MINI_PORT:-16817}
NODES=${SLURM_MINI_NODES:-3}
HASH=$(($(printf '%s' "$DIR" | cksum | cut -d' ' -f1) % 250 + 1)) # several of them on one machine
SUBNET=10.177.$HASH
BRIDGE=mini${HASH}b
HOST=$(uname -n | cut -d. -f1)
export SLURM_CONF=$DIR/etc/slurm.conf

say() { printf 'mini-cluster: %s\n' "$*" >&2; }
die() { say "$*"; tail -n 15 "$DIR"/log/* >&2 2>/dev/null || true; exit 1; }
cable() { echo "mini${HASH}v$1"; } # of a node, by its number

# --- processes we started: "pid start-time", so that nobody else with that number is ever signalled ---------------------------
start_time() { awk '{sub(/.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$1/stat" 2>/dev/null; }
remember() { echo "$2 $(start_time "$2")" >"$DIR/run/$1"; }
alive() { # prints the pid
    local pid since
    read -r pid since 2>/dev/null <"$DIR/run/$1" && [[ $(start_time "$pid") == "$since" ]] && echo "$pid"
}
end() { # by SIGTERM, and SIGKILL after five seconds
    local pid i
    pid=$(alive "$1") || return 0
    kill -TERM "$pid" 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do alive "$1" >/dev/null || return 0; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
}
until_true() { # SECONDS COMMAND...
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.1; done
}

# --- what it takes ------------------------------------------------------------------------------------------------------------
missing() { # prints the first command that is
    local tool
    for tool in slurmctld slurmd sbatch munged mungekey unshare ip; do
        command -v $tool >/dev/null || { echo "$tool"; return; }
    done
}
usable() {
    [[ $(id -u) == 0 ]] || { echo "a cluster of one's own takes root"; return 1; }
    [[ -z $(missing) ]] || { echo "no $(missing) here (tests/cluster/mini-cluster.sh install)"; return 1; }
    unshare --net --uts --mount --pid --fork --kill-child ip link add mini-test type veth peer name mini-peer 2>/dev/null ||
        { echo "namespaces or virtual networks cannot be made here"; return 1; }
}
install() {
    [[ -n $(missing) ]] || return 0
    local policy=/usr/sbin/policy-rc.d log try; log=$(mktemp)
    if [[ ! -e $policy ]]; then # the packages' own services are not to start
        printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy
        # shellcheck disable=SC2064
        trap "rm -f $policy" EXIT
    fi
    for try in 1 2; do
        DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 install -y \
            --no-install-recommends slurm-wlm munge iproute2 util-linux </dev/null >"$log" 2>&1 && return
        [[ $try == 2 ]] || apt-get -o DPkg::Lock::Timeout=120 update >>"$log" 2>&1 || true
    done
    tail -n 20 "$log" >&2; say "apt-get could not install Slurm"; return 1
}

# --- configuration ------------------------------------------------------------------------------------------------------------
configure() {
    local i last=$((NODES - 1))
    mkdir -p "$DIR"/{etc,log,run,state,munge,dev}
    chmod 755 "$DIR" "$DIR"/*
    for i in 0 1; do ln -sfn /dev/null "$DIR/dev/gpu$i"; done # only a device is taken for a GPU
    echo "Name=gpu Flags=nvidia_gpu_env File=$DIR/dev/gpu[0-1]" >"$DIR/etc/gres.conf"
    : >"$DIR/etc/cgroup.conf"
    { echo "127.0.0.1 localhost"; echo "$SUBNET.1 $HOST"
      # In both forms: torch's sockets look for either, and there is no name server to ask.
      for ((i = 0; i < NODES; i++)); do echo "$SUBNET.$((11 + i)) node$i"; echo "::ffff:$SUBNET.$((11 + i)) node$i"; done
    } >"$DIR/etc/hosts"
    cat >"$SLURM_CONF" <<CONF
ClusterName=mini
SlurmctldHost=$HOST($SUBNET.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also what a requeued job waits before it starts again; 120 s by default
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/run/slurmctld.daemon
SlurmctldLogFile=$DIR/log/slurmctld
SlurmdPidFile=$DIR/run/%n.daemon
SlurmdSpoolDir=$DIR/state/%n
SlurmdLogFile=$DIR/log/%n
# what the nodes pretend to have is believed
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
# the controller listens on the bridge only
CommunicationParameters=NoCtldInAddrAny
JobRequeue=1
ReturnToService=2
# seconds until a silent node is down (300 by default), between SIGTERM and SIGKILL
SlurmdTimeout=10
KillWait=5
SlurmctldTimeout=30
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=180
InactiveLimit=0
MinJobAge=7200
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,bf_resolution=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MailProg=/bin/true
GresTypes=gpu
$(for ((i = 0; i < NODES; i++)); do
    echo "NodeName=node$i NodeAddr=$SUBNET.$((11 + i)) Port=$((PORT + 1)) CPUs=4 Sockets=1 CoresPerSocket=4 RealMemory=8000 Gres=gpu:2"
done)
PartitionName=main Nodes=node[0-$last] Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=node[0-$last] MaxTime=INFINITE DefaultTime=30 PriorityTier=10 PreemptMode=OFF
CONF
}

# --- daemons ------------------------------------------------------------------------------------------------------------------
start_munged() {
    [[ -s $DIR/munge/key ]] || mungekey --create --keyfile="$DIR/munge/key" --bits=1024
    chmod 600 "$DIR/munge/key"
    rm -f "$DIR"/munge/socket*
    setsid munged --foreground --force --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --pid-file="$DIR/run/munged.daemon" \
        --log-file="$DIR/log/munged" --seed-file="$DIR/munge/seed" --origin=127.0.0.1 </dev/null >>"$DIR/log/munged" 2>&1 &
    remember munged $!
    until_true 10 munge --socket="$DIR/munge/socket" -n </dev/null || die "munged does not answer"
}

start_controller() {
    alive controller >/dev/null && return
    setsid unshare --mount bash -c 'mount --make-rprivate / && mount --bind "$1" /etc/hosts && exec slurmctld -D' \
        - "$DIR/etc/hosts" </dev/null >>"$DIR/log/slurmctld.out" 2>&1 &
    remember controller $!
    until_true 30 bash -c 'scontrol ping | grep "is UP"' || die "slurmctld does not answer"
}

# The first process of a node, which outlives its slurmd; bash buries whoever is orphaned.
# shellcheck disable=SC2016
NODE='
  echo "$1" >/proc/sys/kernel/hostname
  mount --make-rprivate /; mount -t proc proc /proc; mount --bind "$2/etc/hosts" /etc/hosts; mount -t tmpfs shm /dev/shm
  until [ -e "$2/run/$1.cable" ]; do sleep 0.05; done
  slurmd -D -N "$1" & slurmd=$!
  trap "kill $slurmd; exit" TERM
  while :; do sleep 3600 & wait $!; done'

start_node() { # by its number
    local name=node$1 outside inside=""
    if alive "$name" >/dev/null; then ip link set "$(cable "$1")" up; return; fi
    rm -f "$DIR/run/$name.cable"
    ip link del "$(cable "$1")" 2>/dev/null || true
    setsid unshare --net --uts --mount --pid --fork --kill-child bash -c "$NODE" - "$name" "$DIR" </dev/null >>"$DIR/log/$name.out" 2>&1 &
    outside=$!
    until_true 5 grep -q . "/proc/$outside/task/$outside/children" || die "no namespaces for $name"
    read -r inside _ <"/proc/$outside/task/$outside/children" || true
    remember "$name" "$inside"
    # A fixed address: a node that comes back is not to be hidden behind what the others remember.
    ip link add "$(cable "$1")" type veth peer name eth0 address "$(printf '02:4d:53:%02x:00:%02x' "$HASH" "$1")" netns "$inside"
    ip link set "$(cable "$1")" master "$BRIDGE" up
    nsenter -t "$inside" -n sh -c "ip link set lo up; ip addr add $SUBNET.$((11 + $1))/24 dev eth0; ip link set eth0 up"
    touch "$DIR/run/$name.cable"
}
up() { # COUNT, of the nodes that sinfo has with these options
    [[ $(sinfo -h -N -p main "${@:2}" -o %T | grep -cxE 'idle|mixed|allocated|completing') == "$1" ]]
}
number_of() {
    [[ ${1:-} =~ ^node([0-9]+)$ && ${BASH_REMATCH[1]} -lt $NODES ]] || die "no node '${1:-}'"
    echo "${BASH_REMATCH[1]}"
}
process_of() { alive "$1" || die "$1 has no power"; }

# --- verbs --------------------------------------------------------------------------------------------------------------------
start() {
    local i why
    why=$(usable) || die "$why"
    if ! alive controller >/dev/null; then
        stop
        rm -rf "${DIR:?}"/{state,log,run}
        configure
    fi
    ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
    ip addr replace "$SUBNET.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    alive munged >/dev/null || start_munged
    start_controller
    for ((i = 0; i < NODES; i++)); do start_node "$i"; done
    until_true 60 up "$NODES" || die "not all nodes are up"
    echo "export SLURM_CONF=$SLURM_CONF"
}
queued() { timeout 5 squeue -h -o %A 2>/dev/null | sort -u; }
stop() {
    local i
    [[ -d $DIR/run ]] || return 0
    if alive controller >/dev/null; then
        queued | xargs -r timeout 10 scancel --signal=KILL --full 2>/dev/null || true
        queued | xargs -r timeout 10 scancel 2>/dev/null || true
        until_true 6 bash -c '[[ -z $(timeout 5 squeue -h) ]]' || true
    fi
    for ((i = 0; i < NODES; i++)); do end "node$i"; ip link del "$(cable "$i")" 2>/dev/null || true; done
    end controller
    end munged
    ip link del "$BRIDGE" 2>/dev/null || true
}

verb=${1:-}
shift || true
case $verb in
    install | usable | start | stop) "$verb" ;;
    start-controller) start_controller ;;
    kill-controller) kill -KILL "$(alive controller)" ;;
    start-node) start_node "$(number_of "$1")"; until_true 60 up 1 -n "$1" || die "$1 does not come up" ;;
    cut-power) number=$(number_of "$1"); pid=$(process_of "$1"); ip link set "$(cable "$number")" down; kill -KILL "$pid" ;;
    split) ip link set "$(cable "$(number_of "$1")")" down ;;
    exec) pid=$(process_of "$1"); shift; exec nsenter -t "$pid" -n -u -m -p -- "$@" ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
