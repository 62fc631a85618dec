#!/usr/bin/env bash
# Sets up and runs the tests: bash bash_files/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that wait leave the cores to others
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}          # two tests at a time, one thread each
python -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
