#!/usr/bin/env bash
# Can a model be trained from another model instead of data? Handwritten digits, on any CPU, under 15 minutes on two
# cores. Started again, it goes on where it was stopped.
# bash bash_files/study_distillation.sh [OPTIONS]   options of distillation/digits_distillation.py, e.g. --rhos=0.4,0.1
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here"   # paths among the options are the caller's
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that wait leave the cores to others
exec python "$root/distillation/digits_distillation.py" "$@"
