#!/usr/bin/env bash
# Several machines without a scheduler: run the same line on each of them.
#
#     JOB=1 NODES=3 HEAD=first-machine launch/multinode.sh CONFIG.yaml [dotted.key=value ...]
#
# What arrives: the SIGTERM or Ctrl-C that you send to the harness launch of any one machine. All ranks stop at one step and save it,
# and every machine's launch ends with 75, at most stop.grace_seconds (25) later; torchrun kills after --shutdown-timeout (60 s).
# How it comes back: a rank that dies, or a machine that is lost, has all ranks restarted as soon as NODES machines are there again:
# the same one, or a spare that runs this line. NODES=2:3 continues with two (other bits, the same samples).
# HEAD's loss ends the job on all machines with 1; run the line again everywhere with another JOB. To survive that too, run
# launch/rendezvous.py elsewhere and set RENDEZVOUS=its-host:29400 instead of HEAD.
set -u
: "${JOB:?a name that no earlier start of this job has used}" "${NODES:?how many machines}"
where=(--rdzv-endpoint="${RENDEZVOUS:-${HEAD:?the machine that keeps the rendezvous}:29400}")
# A machine that falls silent is given up after 3 s instead of 15, and a cut-off one gives itself up; see docs/guides/launching.md.
timing=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,read_timeout=10,join_timeout=${JOIN_SECONDS:-600}
exec harness launch --nnodes="$NODES" --nproc-per-node="${NPROC_PER_NODE:-auto}" --rdzv-backend=c10d --rdzv-id="$JOB" \
    "${where[@]}" --rdzv-conf="$timing${RENDEZVOUS:+,is_host=0}" -- train "$@"
