#!/usr/bin/env bash
# Does training on several similar sources beat training on each alone? Handwritten digits, on any CPU, under 15 minutes
# on two cores. Started again, it goes on where it was stopped.
# bash bash_files/study_multi_source.sh [OPTIONS]   options of simulations/digits_multi_source.py, e.g. --seeds=0-9
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/study.sh"
run_study simulations/digits_multi_source.py "$@"
