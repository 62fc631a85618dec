#!/usr/bin/env bash
# Training sets of one class each, for all ten classes of a similarity level.
#
#     bash bash_files/convert/convert_1c.sh [sim3|sim2|sim1]
#
# writes $LATENTS/inet-256-1c-<class>-{100,500,1000}.zip, ready for the presets edm2-img256-xs-1c-*. Class 171, which all
# levels share, is also reached as inet-256-1c-{100,500,1000}.zip.
#
# Every variable below can also be set from outside, e.g. NUMS=100 GPUS=8 bash bash_files/convert/convert_1c.sh sim2
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
    for class in "${CLASSES[@]}"; do
        make "inet-$RESOLUTION-1c-$class-$num" "$class" "$num"
    done
    for folder in "$PIXELS" "$LATENTS"; do
        ln -sfn "inet-$RESOLUTION-1c-${CLASSES[0]}-$num.zip" "$folder/inet-$RESOLUTION-1c-$num.zip"
    done
done
