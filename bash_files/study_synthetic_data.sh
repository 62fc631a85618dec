#!/usr/bin/env bash
# Do generated images train better classifiers? Few handwritten digits, on any CPU, under 15 minutes on two cores. Started
# again, it goes on where it was stopped.
# bash bash_files/study_synthetic_data.sh [OPTIONS]   options of synthetic_data/digits_synthetic_data.py, e.g. --real=20 --seeds=0-9
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/study.sh"
run_study synthetic_data/digits_synthetic_data.py "$@"
