#!/usr/bin/env bash
#SBATCH --job-name=diffusion
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.txt
# A training under SLURM, a process for each GPU, that goes on by itself after its time limit, preemption or a lost node:
#
#     sbatch --nodes=4 bash_files/slurm/job.sh train_edm2.py --outdir=training-runs/RUN --data=DATA.zip --preset=...
#     sbatch --array=0-4 bash_files/slurm/job.sh train.py --outdir=runs/seed-{task} --nosubdir --seed={task} --data=...
#
# {task} becomes the index in the array. 180 seconds before the limit the processes save a checkpoint and exit, and the job is
# queued again; the same command then goes on. A sweep, each task of the array with its share of the runs:
#
#     sbatch --array=0-7 --ntasks-per-node=1 bash_files/slurm/job.sh bash_files/train/sweep_memorization.sh width depth
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
task=${SLURM_ARRAY_TASK_ID:-0}
set -- "${@//\{task\}/$task}"
case "$1" in
    *.sh)
        export SHARE=${SHARE:-$task/${SLURM_ARRAY_TASK_COUNT:-1}} PORT=${PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}
        set -- bash "$@" ;;
    *) set -- "${PYTHON:-python}" "$@" ;;
esac

stopped=
stop() {
    stopped=1
    kill -TERM "$step"
}
srun --kill-on-bad-exit=1 "$@" &
step=$!
trap stop TERM
status=0
wait "$step" || status=$?
if [[ -n "$stopped" ]]; then                        # the trap has ended the first wait
    status=0
    wait "$step" || status=$?
    echo "Stopped by SIGTERM (status $status); queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
