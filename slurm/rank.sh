#!/usr/bin/env bash
# rank.sh COMMAND...: one rank of a training job, under `srun --kill-on-bad-exit=1`.
#
# srun has the first rank that fails take the others with it. When all fail for one reason, such as a
# mistyped key, that would hide what they say and their status (143 instead of 2). So a rank that
# fails holds its status back for a moment in which the others come to their own end; one that hangs
# is still killed after it. One that was ended by SIGTERM, because another had failed, leaves the
# status of the job to that one: srun's is the highest.

# Slurm signals this shell too, and it must outlive COMMAND. Being inherited, this also covers the
# moment before COMMAND has handlers of its own.
trap '' TERM USR1
status=0
"$@" || status=$?
((status == 0)) || sleep 3
((status != 143)) || status=1
exit "$status"
