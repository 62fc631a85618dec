#!/usr/bin/env bash
# One class-conditional model on ten classes of a similarity level, 1000 images of each.
#
#     bash bash_files/train/train_10c_1000.sh [sim3|sim2|sim1]
#
# Every variable below can also be set from outside, e.g. GPUS=2 BATCH=2048 bash bash_files/train/train_10c_1000.sh sim2
# Relative paths start at the root of the repository. The same command resumes a stopped run.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SIM=${1:-sim3}                                      # similarity level
LATENTS=${LATENTS:-datasets/latent_datasets/$SIM}   # made by bash_files/convert/convert_10c.sh
RUNS=${RUNS:-training-runs}                         # where the run goes
PRESET=${PRESET:-edm2-img256-xs-10c-1000}
GPUS=${GPUS:-8}                                     # processes on this machine
PORT=${PORT:-25641}
BATCH=${BATCH:-$((1024 * 8))}                       # images of one step over all GPUs
EXTRA=${EXTRA:-}                                    # further options of train_edm2.py

torchrun --nproc_per_node="$GPUS" --master_port="$PORT" train_edm2.py \
    --outdir="$RUNS/$SIM-edm2-img256-xs-10c-1000" --data="$LATENTS/inet-256-10c-1000.zip" --preset="$PRESET" \
    --batch="$BATCH" --status=64Ki --snapshot=16Mi --checkpoint=64Mi $EXTRA
