#!/usr/bin/env bash
# Ten models, each on one class of a similarity level with 1000 images: what the ten-class model is compared with.
#
#     [NAME=VALUE ...] bash bash_files/train/train_1c_1000.sh [sim3|sim2|sim1]
#
# The variables are those of train_models in bash_files/functions.sh. The same command goes on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../functions.sh"
train_models 1
