#!/usr/bin/env bash
# Do generated images make classifiers more robust? Few handwritten digits, on any CPU, some five minutes on two cores. Started
# again, it goes on where it was stopped.
# bash bash_files/study_synthetic_data.sh [OPTIONS]   options of synthetic_data/digits_synthetic_data.py, e.g. --reals=5,20 --seeds=0-5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/study.sh"
run_study synthetic_data/digits_synthetic_data.py "$@"
