#!/usr/bin/env bash
# Training sets of all ten classes of a similarity level.
#
#     bash bash_files/convert/convert_10c.sh [sim3|sim2|sim1]
#
# writes $LATENTS/inet-256-10c-{100,500,1000}.zip, ready for the presets edm2-img256-xs-10c-*.
#
# Every variable below can also be set from outside, e.g. NUMS=100 GPUS=8 bash bash_files/convert/convert_10c.sh sim2
# Relative paths start at the root of the repository.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SIM=${1:-sim3}                                      # similarity level
SOURCE=${SOURCE:-downloads/imagenet/train}          # folder with a folder for each wnid
PIXELS=${PIXELS:-datasets/img_datasets/$SIM}        # where the pictures go
LATENTS=${LATENTS:-datasets/latent_datasets/$SIM}   # where the latents go
VAE=${VAE:-${SD_VAE:-stabilityai/sd-vae-ft-mse}}     # autoencoder: hub name or local folder
NUMS=${NUMS:-100 500 1000}                          # images per class
RESOLUTION=${RESOLUTION:-256}
SEED=${SEED:-0}                                     # which images are drawn
GPUS=${GPUS:-1}                                     # processes that encode
PYTHON=${PYTHON:-python}

source bash_files/convert/functions.sh

for num in $NUMS; do
    make "inet-$RESOLUTION-10c-$num" "$(join "${CLASSES[@]}")" "$num"
done
