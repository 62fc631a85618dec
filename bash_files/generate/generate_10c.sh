#!/usr/bin/env bash
# Images of each of ten classes, from one model trained on the ten.
#
#     bash bash_files/generate/generate_10c.sh [sim3|sim2|sim1]
#
# Every variable below can also be set from outside, e.g. SEEDS=0-99 GPUS=1 bash bash_files/generate/generate_10c.sh sim2
# Relative paths start at the root of the repository. The same command goes on where it was stopped.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source bash_files/classes.sh

SIM=${1:-sim3}                                      # similarity level
CLASSES=${CLASSES:-$(similarity_classes "$SIM")}    # ImageNet indices
NUM=${NUM:-1000}                                    # training images of each class
RUNS=${RUNS:-training-runs}                         # made by bash_files/train
OUT=${OUT:-generated}                               # where the images go
STD=${STD:-0.100}                                   # EMA width of the snapshot
SEEDS=${SEEDS:-0-4999}                              # images of each class
BATCH=${BATCH:-64}                                  # images at a time on each GPU
GPUS=${GPUS:-8}                                     # processes on this machine
PORT=${PORT:-25641}
EXTRA=${EXTRA:-}                                    # further options of generate_images.py

for class in $CLASSES; do
    run="$RUNS/$SIM-edm2-img256-xs-10c-$NUM"
    net=$(ls "$run"/network-snapshot-*-"$STD".pkl 2>/dev/null | tail -n 1) ||
        { echo "Error: no snapshot of width $STD in $run; train it with bash_files/train first" >&2; exit 1; }
    torchrun --nproc_per_node="$GPUS" --master_port="$PORT" generate_images.py --net="$net" --class="$class" \
        --outdir="$OUT/$SIM-10c-$NUM/$class" --subdirs --seeds="$SEEDS" --batch="$BATCH" $EXTRA
done
