#!/usr/bin/env bash
# Does class-balancing training help rare classes? A long tail of handwritten digits, on any CPU, under 15 minutes on two
# cores. Started again, it goes on where it was stopped.
# bash bash_files/study_long_tail.sh [OPTIONS]   options of long_tail/digits_long_tail.py, e.g. --seeds=0-9 --steps=20000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/study.sh"
run_study long_tail/digits_long_tail.py "$@"
