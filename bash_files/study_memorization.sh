#!/usr/bin/env bash
# When does a diffusion model copy its training set? Handwritten digits, on any CPU, under 15 minutes on two cores. Started
# again, it goes on where it was stopped.
# bash bash_files/study_memorization.sh [OPTIONS]   options of data_utils/digits_memorization.py, e.g. --sizes=20,100,500
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here"   # paths among the options are the caller's
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that wait leave the cores to others
exec python "$root/data_utils/digits_memorization.py" "$@"
