#!/usr/bin/env bash
# Does class-balancing training help rare classes? A long tail of handwritten digits, on any CPU, under 15 minutes on two
# cores. Started again, it goes on where it was stopped.
# bash bash_files/study_long_tail.sh [OPTIONS]   options of long_tail/digits_long_tail.py, e.g. --seeds=0-9 --steps=20000
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here"   # paths among the options are the caller's
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that wait leave the cores to others
exec python "$root/long_tail/digits_long_tail.py" "$@"
