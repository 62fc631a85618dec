#!/usr/bin/env bash
# Sets up and runs the tests: bash bash_files/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m pytest -q "$@"
