#!/usr/bin/env bash
# Ten models, each on one class of a similarity level with 1000 images: what the ten-class model is compared with.
#
#     bash bash_files/train/train_1c_1000.sh [sim3|sim2|sim1]
#
# Every variable below can also be set from outside, e.g. CLASSES="171 182" GPUS=2 bash bash_files/train/train_1c_1000.sh
# Relative paths start at the root of the repository. The same command goes on where it was stopped.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source bash_files/classes.sh

SIM=${1:-sim3}                                      # similarity level
CLASSES=${CLASSES:-$(similarity_classes "$SIM")}    # ImageNet indices
LATENTS=${LATENTS:-datasets/latent_datasets/$SIM}   # made by bash_files/convert/convert_1c.sh
RUNS=${RUNS:-training-runs}                         # where the runs go
PRESET=${PRESET:-edm2-img256-xs-1c-1000}
GPUS=${GPUS:-8}                                     # processes on this machine
PORT=${PORT:-25641}
BATCH=${BATCH:-$((1024 * 8))}                       # images of one step over all GPUs
EXTRA=${EXTRA:-}                                    # further options of train_edm2.py

for class in $CLASSES; do
    torchrun --nproc_per_node="$GPUS" --master_port="$PORT" train_edm2.py \
        --outdir="$RUNS/$SIM-edm2-img256-xs-1c-$class-1000" --data="$LATENTS/inet-256-1c-$class-1000.zip" \
        --preset="$PRESET" --batch="$BATCH" --status=64Ki --snapshot=16Mi --checkpoint=64Mi $EXTRA
done
