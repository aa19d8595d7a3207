#!/usr/bin/env bash
# Starts SLURM as root on this one machine for tests/experiments/run/test_slurm_cluster.py: Debian's packages, one node, one
# partition, no accounting. Does nothing where a node answers already.
set -euo pipefail

fail() {
    echo "start_slurm.sh: $*" >&2
    exit 1
}

idle() { [[ "$(timeout 5 sinfo --noheader --format=%T 2>/dev/null)" =~ ^(idle|mixed|allocated)$ ]]; }

[ "$(id -u)" = 0 ] || fail "must be root"
conf=/etc/slurm/slurm.conf
[ ! -f $conf ] || grep -q ClusterName=tests $conf || fail "$conf is of another cluster"

# As the name of the node, what slurmd would call this machine.
host="$(hostname -s 2>/dev/null || uname -n)"
logs=/var/log/slurm

if ! { command -v sbatch && command -v slurmd && command -v munged; } >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null ||
        fail "cannot install slurm-wlm and munge"
fi
idle && exit

[ -f /etc/munge/munge.key ] || mungekey --create
install -d -o munge -g munge -m 0755 /run/munge
install -d /etc/slurm "$logs" /var/spool/slurmctld /var/spool/slurmd

# A requeued job waits for cred_expire seconds, 120 by default; the last intervals schedule at once.
cat >$conf <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$logs/slurmctld.log
SlurmdLogFile=$logs/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo) State=UNKNOWN
PartitionName=tests Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF

pidof munged >/dev/null || runuser -u munge -- munged || fail "munged does not start"
pidof slurmctld >/dev/null || slurmctld || fail "slurmctld does not start; see $logs"
pidof slurmd >/dev/null || slurmd || fail "slurmd does not start; see $logs"

for _ in $(seq 60); do
    if idle; then exit; fi
    sleep 1
done
fail "no node is idle after 60 s; see $logs"
