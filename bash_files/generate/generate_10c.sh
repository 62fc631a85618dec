#!/usr/bin/env bash
# Images of each of ten classes, from one model trained on the ten. Each class is
# measured against its training pictures, and the numbers are added to fids.txt.
#
#     [NAME=VALUE ...] bash bash_files/generate/generate_10c.sh [sim3|sim2|sim1]
#
# The variables are those of generate_classes in bash_files/functions.sh. The same command goes on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../functions.sh"
generate_classes 10
