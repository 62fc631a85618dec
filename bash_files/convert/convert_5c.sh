#!/usr/bin/env bash
# Training sets of the first five classes of a similarity level: inet-256-5c-{100,500,1000}.zip in
# datasets/latent_datasets/<level>, ready for the presets edm2-img256-xs-5c-*.
#
#     [NAME=VALUE ...] bash bash_files/convert/convert_5c.sh [sim3|sim2|sim1]
#
# The variables are those of convert_sets in bash_files/functions.sh. The same command goes on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../functions.sh"
convert_sets 5
