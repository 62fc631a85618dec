#!/usr/bin/env bash
# Training sets of one class each, for all ten classes of a similarity level: inet-256-1c-<class>-{100,500,1000}.zip in
# datasets/latent_datasets/<level>, ready for the presets edm2-img256-xs-1c-*. Class 171, which all levels share, is also
# reached as inet-256-1c-{100,500,1000}.zip. Also the statistics of each, dataset-refs/<level>/inet-256-1c-*.pkl, against
# which generate/ measures.
#
#     [NAME=VALUE ...] bash bash_files/convert/convert_1c.sh [sim3|sim2|sim1]
#
# The variables are those of convert_sets in bash_files/functions.sh. The same command goes on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../functions.sh"
convert_sets 1
