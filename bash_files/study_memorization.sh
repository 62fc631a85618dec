#!/usr/bin/env bash
# When does a diffusion model copy its training set? Handwritten digits, on any CPU, under 15 minutes on two cores. Started
# again, it goes on where it was stopped.
# bash bash_files/study_memorization.sh [OPTIONS]   options of data_utils/digits_memorization.py, e.g. --factors=width
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/study.sh"
run_study data_utils/digits_memorization.py "$@"
