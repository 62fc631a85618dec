#!/usr/bin/env bash
# Does training on several similar sources beat training on each alone? Handwritten digits, on any CPU, under 15 minutes
# on two cores. Started again, it goes on where it was stopped.
# bash bash_files/study_multi_source.sh [OPTIONS]   options of simulations/digits_multi_source.py, e.g. --seeds=0-9
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here"   # paths among the options are the caller's
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that wait leave the cores to others
exec python "$root/simulations/digits_multi_source.py" "$@"
