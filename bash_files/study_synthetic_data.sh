#!/usr/bin/env bash
# Do generated images train better classifiers? Few handwritten digits, on any CPU, under 15 minutes on two cores. Started
# again, it goes on where it was stopped.
# bash bash_files/study_synthetic_data.sh [OPTIONS]   options of synthetic_data/digits_synthetic_data.py, e.g. --real=20 --seeds=0-9
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here"   # paths among the options are the caller's
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that wait leave the cores to others
exec python "$root/synthetic_data/digits_synthetic_data.py" "$@"
