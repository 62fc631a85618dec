# Sourced by the other scripts: goes to the root of the repository and activates its virtual environment (.venv),
# which is made on first use. With PYTHON=/path/to/python that interpreter is used as it is instead.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo 'Error: needs Python 3.10 to 3.13 (looked for python3, python3.10 ... python3.13)' >&2
    return 1
}

install_requirements() {
    local extra=()
    # Without an NVIDIA GPU, torch's CPU wheels do; their server is asked only if it answers.
    if ! command -v nvidia-smi >/dev/null && python -c '
import urllib.request
urllib.request.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=5)' 2>/dev/null; then
        extra=(--extra-index-url https://download.pytorch.org/whl/cpu)
    fi
    echo 'Installing the requirements (once; some minutes)'
    python -m pip install --quiet "${extra[@]+"${extra[@]}"}" -r requirements.txt
    cp requirements.txt .venv/installed-requirements.txt
}

if [ -n "${PYTHON:-}" ]; then
    PATH="$(cd "$(dirname "$(command -v "$PYTHON")")" && pwd):$PATH"
else
    if [ ! -f .venv/bin/activate ]; then
        python_found=$(find_python)
        echo "Making a virtual environment in .venv with $("$python_found" --version)"
        "$python_found" -m venv .venv || { echo 'Error: python -m venv failed; on Debian: apt install python3-venv' >&2; exit 1; }
    fi
    source .venv/bin/activate
    cmp -s requirements.txt .venv/installed-requirements.txt || install_requirements
fi
