#!/usr/bin/env bash
# A real Slurm cluster on one machine, for tests: munged, slurmctld and a slurmd a node. As root, after `make slurm-packages`.
#
#   cluster.sh start              start, and return when every node is idle
#   cluster.sh exec CMD [ARG...]  run CMD as a user on the head host (sbatch, squeue, ...)
#   cluster.sh on NODE CMD...     run CMD inside a node (looks, or sabotage)
#   cluster.sh crash|boot NODE    power off: every process of the node dies at once; power on again
#   cluster.sh cut|heal NODE      pull the network cable, plug it in again
#   cluster.sh ctl-stop|ctl-start stop and start slurmctld (jobs must survive it)
#   cluster.sh status | stop
#
# Every node has its own network, host name, /etc/hosts, process tree and /dev/shm, like a machine of its own, in namespaces that
# reach nothing outside; files are shared, like a cluster's parallel file system.
set -euo pipefail

DIR=${SLURM_TEST_DIR:-/tmp/slurm-test-$(id -u)}      # all state lives here; several clusters = several DIRs
NODES=${SLURM_TEST_NODES:-3}
CPUS=${SLURM_TEST_CPUS:-8}                           # CPUs each node *claims*; real ones are shared
MEM=${SLURM_TEST_MEM:-8000}                          # MB each node claims
GPUS=${SLURM_TEST_GPUS:-4}                           # fake GPUs per node, 0 = none
SUBNET=10.77.0                                       # exists only inside our own namespaces
OWNER=${SLURM_TEST_OWNER:-}                          # a process id: the cluster stops when that process is gone
GRACE=${SLURM_TEST_GRACE:-10}                        # GraceTime of the preemptible partition, s
KILLWAIT=${SLURM_TEST_KILLWAIT:-5}                   # SIGTERM -> SIGKILL, s (production default 30)
NODE_TIMEOUT=${SLURM_TEST_NODE_TIMEOUT:-10}          # silence after which a node is DOWN (production 300)
CRED=${SLURM_TEST_CRED:-10}                          # s a requeued job waits (production 120); under 10 busy machines fail
PREEMPT_SIGNAL=${SLURM_TEST_PREEMPT_SIGNAL:-yes}     # yes: preemption sends the job's own --signal

export PATH=$PATH:/usr/sbin:/sbin
CONF=$DIR/etc/slurm.conf
say() { printf "slurm_cluster: %s\n" "$*" >&2; }
die() { say "$*"; exit 1; }

nodes() { local i; for ((i = 1; i <= NODES; i++)); do echo "n$i"; done; }
saved() { [ ! -f "$DIR/settings" ] || . "$DIR/settings"; }

# A pid counts as ours only while its command line names our DIR (pids are reused).
ours() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$DIR" &&
        echo "$pid"
}
end() { # PIDFILE [SIGNAL]: signal it, wait until it is gone, then insist
    local pid i
    pid=$(ours "$1") || { rm -f "$1"; return 0; }
    kill "-${2:-TERM}" "$pid" 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do ours "$1" >/dev/null || break; sleep 0.1; done
    ours "$1" >/dev/null && kill -9 "$pid" 2>/dev/null
    rm -f "$1"
}

in_head() {
    local pid
    pid=$(ours "$DIR/run/head.pid") || die "no cluster in $DIR"
    nsenter -t "$pid" -n -u -m --wdns="$PWD" -- "$@"
}
client() { in_head env SLURM_CONF="$CONF" "$@"; }

write_conf() {
    mkdir -p "$DIR"/{etc,run,log,state,spool,dev,munge}
    rm -f "$DIR"/etc/*
    chmod 755 "$DIR" "$DIR/munge"
    local i n gres='' files=()
    [ "$GPUS" = 0 ] || gres=" Gres=gpu:fake:$GPUS"
    (umask 077; [ -s "$DIR/munge/key" ] || head -c 1024 /dev/urandom >"$DIR/munge/key")
    {   cat <<END
ClusterName=test
SlurmctldHost=head($SUBNET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again: 120 s unless set, 5 at least
AuthInfo=socket=$DIR/munge/socket,cred_expire=$CRED
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
# no cgroups, no systemd, no binding to CPUs that are not there
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PropagateResourceLimits=NONE
# react in seconds, not minutes
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdTimeout=$NODE_TIMEOUT
KillWait=$KILLWAIT
ReturnToService=2
# without slurmdbd, 'scontrol show job' is the only record: keep finished jobs
MinJobAge=86400
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
# preemption: a job in 'urgent' throws out a job in 'train'
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
        [ "$PREEMPT_SIGNAL" != yes ] || echo "SlurmctldParameters=preempt_send_user_signal"
        [ "$GPUS" = 0 ] || echo "GresTypes=gpu"
        i=0
        for n in $(nodes); do
            i=$((i + 1))
            echo "NodeName=$n NodeHostname=$n NodeAddr=$SUBNET.$((10 + i)) CPUs=$CPUS RealMemory=$MEM$gres"
        done
        echo "PartitionName=train  Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10  PreemptMode=REQUEUE GraceTime=$GRACE"
        echo "PartitionName=urgent Nodes=ALL Default=NO  MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF"
    } >"$CONF"
    if [ "$GPUS" != 0 ]; then
        # Slurm wants a device node as File= of each GPU, or it drains the node: copies of /dev/null.
        for ((i = 0; i < GPUS; i++)); do
            rm -f "$DIR/dev/nvidia$i"
            mknod -m 666 "$DIR/dev/nvidia$i" c 1 3
            files+=("$DIR/dev/nvidia$i")
        done
        echo "Name=gpu Type=fake File=$(IFS=,; echo "${files[*]}")" >"$DIR/etc/gres.conf"
    fi
    # From 24.05 on, 'no cgroups' has to be said; older ones do not know the word. (Run here: 22.05 only.)
    case $(slurmd -V) in *\ 2[0-3].*) ;; *) echo CgroupPlugin=disabled >"$DIR/etc/cgroup.conf" ;; esac
    {   echo "127.0.0.1 localhost"; echo "$SUBNET.1 head"
        i=0; for n in $(nodes); do i=$((i + 1)); echo "$SUBNET.$((10 + i)) $n"; done; } >"$DIR/etc/hosts"
    echo "NODES=$NODES" >"$DIR/settings"
}

boot_head() {
    unshare --net --uts --mount bash -c '
        hostname head; mount --bind "$1/etc/hosts" /etc/hosts
        ip link set lo up; ip link add br0 type bridge; ip addr add "$2.1/24" dev br0; ip link set br0 up
        echo $$ >"$1/run/head.pid"; : >"$1/run/head.up"
        trap exit TERM; while :; do sleep 3600 & wait $!; done' head "$DIR" "$SUBNET" </dev/null >>"$DIR/log/head.log" 2>&1 &
    disown; await "head host" test -e "$DIR/run/head.up"
}

boot_node() { # NAME
    local n=$1 i=${1#n} pid head
    ours "$DIR/run/node-$n.pid" >/dev/null && return 0
    rm -f "$DIR/run/node-$n."*
    # bash is init of the node. It learns its pid outside from the outer /proc before it mounts its own.
    unshare --net --uts --mount --pid --fork bash -c '
        dir=$1 name=$2 ip=$3
        read -r pid _ </proc/self/stat; echo "$pid" >"$dir/run/node-$name.pid"
        hostname "$name"; mount -t proc proc /proc; mount -t tmpfs tmpfs /dev/shm
        mount --bind "$dir/etc/hosts" /etc/hosts; ip link set lo up
        : >"$dir/run/node-$name.up"
        until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
        ip addr add "$ip/24" dev eth0; ip link set eth0 up
        export SLURM_CONF=$dir/etc/slurm.conf
        slurmd -N "$name" -f "$SLURM_CONF"
        trap "exit 0" TERM; while :; do sleep 3600 & wait $!; done' node "$DIR" "$n" "$SUBNET.$((10 + i))" \
        </dev/null >>"$DIR/log/node-$n.log" 2>&1 &
    disown; await "node $n" test -e "$DIR/run/node-$n.up"
    pid=$(ours "$DIR/run/node-$n.pid") && head=$(ours "$DIR/run/head.pid") || die "node $n did not come up"
    nsenter -t "$head" -n ip link add "to-$n" type veth peer name "of-$n"
    nsenter -t "$head" -n ip link set "to-$n" master br0 up
    # the same MAC after every boot, as a real machine has: else its peers talk to a stale address for seconds
    nsenter -t "$head" -n ip link set "of-$n" address "$(printf '02:00:00:00:00:%02x' "$i")"
    nsenter -t "$head" -n ip link set "of-$n" netns "$pid" name eth0
}

await() { # WHAT CMD...: up to 30 s
    local what=$1 i; shift
    for ((i = 0; i < 600; i++)); do "$@" >/dev/null 2>&1 && return 0; sleep 0.05; done
    die "gave up waiting for $what; see $DIR/log"
}
all_idle() { [ "$(client sinfo -h -N -p train -o %t | grep -cx idle)" = "$NODES" ]; }

watch_owner() {
    [ -n "$OWNER" ] || return 0
    SLURM_TEST_DIR=$DIR setsid bash -c 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; exec bash "$2" stop' \
        watch "$OWNER" "$0" "$DIR" </dev/null >>"$DIR/log/watch.log" 2>&1 &
    echo $! >"$DIR/run/watch.pid"; disown
}

ctl_start() { in_head slurmctld -f "$CONF"; await slurmctld client scontrol ping; }

start() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null ||
        die "Slurm is not installed: make slurm-packages"
    [ -z "$(ours "$DIR/run/slurmctld.pid")" ] || { say "already running in $DIR"; return 0; }
    (stop quiet); write_conf; watch_owner; boot_head
    in_head munged --force --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" --pid-file="$DIR/munge/munged.pid" \
        --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed"
    in_head slurmctld -c -f "$CONF"
    local n; for n in $(nodes); do boot_node "$n"; done
    await "idle nodes" all_idle
    say "$NODES nodes idle in $DIR"
}

stop() {
    saved
    local n
    end "$DIR/run/watch.pid"
    for n in $(nodes); do end "$DIR/run/node-$n.pid" KILL; done
    end "$DIR/run/slurmctld.pid"; end "$DIR/munge/munged.pid"; end "$DIR/run/head.pid"
    rm -rf "$DIR"/{state,spool,run,munge}
    [ "${1:-}" = quiet ] || say "stopped"
}

node_pid() { ours "$DIR/run/node-$1.pid" || die "node $1 is not up"; }

case ${1:-} in
start) start ;;
stop) stop ;;
status) saved; client sinfo -N -l; client squeue -l ;;
exec) shift; saved; client "$@" ;;
on) saved; pid=$(node_pid "$2"); shift 2; nsenter -t "$pid" -a --wdns="$PWD" -- env SLURM_CONF="$CONF" "$@" ;;
crash) saved; node_pid "$2" >/dev/null; end "$DIR/run/node-$2.pid" KILL; rm -f "$DIR/run/slurmd-$2.pid" ;;
boot) saved; boot_node "$2" ;;
cut | heal) saved; in_head ip link set "to-$2" "$([ "$1" = cut ] && echo down || echo up)" ;;
ctl-stop) saved; end "$DIR/run/slurmctld.pid" ;;
ctl-start) saved; ctl_start ;;
*) sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
