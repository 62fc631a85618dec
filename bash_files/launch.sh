# Sourced by the scripts that start Python: goes to the root of the repository, where relative paths start.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python}
EXTRA=${EXTRA:-}                                    # further options of the Python script
PORT=${PORT:-25641}                                 # where processes meet

# launch SCRIPT [OPTIONS], on $GPUS processes of this machine
launch() { torchrun --nproc_per_node="$GPUS" --master_port="$PORT" "$@"; }
