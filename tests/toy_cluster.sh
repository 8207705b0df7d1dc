#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, for the tests and to try the profile on: as root, on Linux, with
# apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#   tests/toy_cluster.sh start FOLDER    then: source FOLDER/environment
#   tests/toy_cluster.sh lose FOLDER N   node N dies with what runs on it
#   tests/toy_cluster.sh stop FOLDER
set -euo pipefail
what=$1 S=$(mkdir -p "$2" && cd "$2" && pwd) HOST=$(hostname -s)

start() {
  mkdir -p "$S"/{run,log,state,spool.node1,spool.node2,bin}
  PORT=${KMEX_SLURM_PORT:-$((20000 + $$ % 10000 * 3))}
  cat > "$S/slurm.conf" << END
ClusterName=toy
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$S/run/munge.sock,cred_expire=5
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool.%n
SlurmctldPidFile=$S/run/slurmctld.pid
SlurmdPidFile=$S/run/slurmd.%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=5
SlurmctldTimeout=10
InactiveLimit=0
MessageTimeout=5
KillWait=5
JobRequeue=1
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=1
NodeName=node1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=1 RealMemory=4000 State=UNKNOWN
NodeName=node2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
END
  # inside a job SLURM_CONF is gone: srun finds its configuration by this one
  printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' "$S/slurm.conf" "$(command -v srun)" > "$S/bin/srun"
  chmod 755 "$S/bin/srun"
  printf 'export SLURM_CONF=%q PATH=%q:"$PATH"\n' "$S/slurm.conf" "$S/bin" > "$S/environment"
  dd if=/dev/urandom of="$S/run/key" bs=1024 count=1 status=none
  chmod 600 "$S/run/key"
  munged --force --key-file="$S/run/key" --socket="$S/run/munge.sock" --pid-file="$S/run/munged.pid" \
    --log-file="$S/log/munged.log" --seed-file="$S/run/seed"
  export SLURM_CONF=$S/slurm.conf
  slurmctld
  for node in node1 node2; do slurmd -N $node; done
  for _ in $(seq 100); do
    [ "$(sinfo -h -o %T -N 2> /dev/null | sort | uniq -c | xargs)" = "2 idle" ] && return
    sleep 0.2
  done
  cat "$S"/log/*.log >&2
  exit 1
}

# the daemon and all that its jobs started: what an orphan finished would not be lost
lose() {
  export SLURM_CONF=$S/slurm.conf
  local job
  kill -9 "$(cat "$S/run/slurmd.node$1.pid")"
  for job in $(squeue -h -w "node$1" -o %A); do
    for step in $(pgrep -f "^slurmstepd: \\[$job\\." || true); do end "$step"; done
  done
}

end() {
  kill -STOP "$1" 2> /dev/null || true # so that it starts nothing more
  for child in $(pgrep -P "$1" || true); do end "$child"; done
  kill -9 "$1" 2> /dev/null || true
}

stop() {
  for pid in "$S"/run/slurmd.*.pid "$S/run/slurmctld.pid" "$S/run/munged.pid"; do
    [ -f "$pid" ] && kill "$(cat "$pid")" 2> /dev/null || true
  done
}

"$what" "${@:3}"
