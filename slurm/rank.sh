#!/usr/bin/env bash
# rank.sh COMMAND...: one rank of a training job, under `srun --kill-on-bad-exit=1`.
#
# When one rank fails, srun kills the others. If all fail for the same reason, such as a mistyped key,
# that would hide their messages and their status (143 instead of 2). So a failed rank delays its exit
# for a moment in which the others can end by themselves; one that hangs is still killed afterwards. A
# rank that was ended by SIGTERM because another had failed leaves the job's status to that one, as srun
# reports the highest.

# Slurm signals this shell too, and it must outlive COMMAND. Being inherited, this also covers the
# moment before COMMAND has handlers of its own.
trap '' TERM USR1
status=0
"$@" || status=$?
((status == 0)) || sleep 3
((status != 143)) || status=1
exit "$status"
