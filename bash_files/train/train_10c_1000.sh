#!/usr/bin/env bash
# One class-conditional model on ten classes of a similarity level, 1000 images of each.
#
#     [NAME=VALUE ...] bash bash_files/train/train_10c_1000.sh [sim3|sim2|sim1]
#
# The variables are those of train_models in bash_files/functions.sh. The same command goes on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../functions.sh"
train_models 10
