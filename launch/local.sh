#!/usr/bin/env bash
# One machine: a process for each GPU, or for each CPU core where there is none (RANKS=2 says otherwise).
#
#   launch/local.sh configs/gpt.yaml checkpoint.url=runs/mine
#
# What arrives, what it does, and how the run comes back:
#
#   Ctrl-C; SIGTERM or SIGHUP to    torchrun passes it on. All ranks finish the same step and save it, or give up after
#     torchrun (kill, a shutdown,   stop.grace_seconds (25); GRACE_SECONDS (60) after the signal torchrun sends SIGKILL.
#     the terminal closes)          Start the same command again: it continues from the last save.
#                                   nohup does not keep a SIGHUP away: torchrun listens to it. Use tmux or setsid.
#   SIGTERM to one of the ranks     The same for all ranks, and torchrun says 0. Start the same command again.
#   a rank dies (a crash,           The others end, too: at once, or by torchrun's SIGKILL after 30 s (fixed in torch). torchrun
#     kill -9, out of memory)       starts all of them anew, RESTARTS times at most; they go on from the last save.
#   torchrun dies (kill -9), or     The ranks die with it. Start the same command again: it continues from the last save.
#     the machine goes down
#
# torchrun's exit code is 1 for every failure and for Ctrl-C; `harness launch -- train ...` runs the same torchrun and ends with
# the codes of docs/reference/exit-codes.md.
set -euo pipefail

# torch 2.13 lends the workers the launcher's own store, which keeps the addresses of earlier starts: a restarted process may
# call at the dead rank 0's address, and a node that joins later waits for an address that nobody publishes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun sets it where there are several processes and not where there is one; bits should not depend on that.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
    --standalone \
    --nproc-per-node="${RANKS:-auto}" \
    --max-restarts="${RESTARTS:-10}" \
    --shutdown-timeout="${GRACE_SECONDS:-60}" \
    -m harness train "$@"
