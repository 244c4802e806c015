#!/usr/bin/env bash
# Stage 1, the VQGAN. One rank per GPU; without GPUs, one per task.
#
#   sbatch slurm/train_vqgan.sh [+experiment=flickr] [key=value ...]
#   sbatch --nodes=4 slurm/train_vqgan.sh data.global_batch=384
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 slurm/train_vqgan.sh +scale=laptop
#
# The same command starts a run and resumes it. The job requeues itself until the run is finished:
# Slurm warns the ranks (USR1) 3 to 4 minutes before the time limit, and they save and end. It warns
# them rather than this script (B:USR1), which could only pass it on. See docs/operations.md.
#SBATCH --job-name=vqgan
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180

root=${TAMING_DIST:-${SLURM_SUBMIT_DIR:-$PWD}} # sbatch runs a copy of this file from elsewhere
if [[ ! -f $root/slurm/environment.sh ]]; then
    echo "error: $root is not taming_dist: submit from the repository, or set TAMING_DIST to it" >&2
    exit 2
fi
# shellcheck source=slurm/environment.sh
source "$root/slurm/environment.sh"

until_finished train flickr "$@"
