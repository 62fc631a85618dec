#!/usr/bin/env bash
# Can a model be trained from another model instead of data? Handwritten digits, on any CPU, under 15 minutes on two
# cores. Started again, it goes on where it was stopped.
# bash bash_files/study_distillation.sh [OPTIONS]   options of distillation/digits_distillation.py, e.g. --rhos=0.4,0.1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/study.sh"
run_study distillation/digits_distillation.py "$@"
