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

# Does requirements.lock, which has a hash of every package, apply to this Python and machine?
lock_applies() {
    python -c '
import platform, sys
glibc = [int(part) for part in platform.libc_ver()[1].split(".")]
sys.exit(not (sys.version_info[:2] in ((3, 11), (3, 12)) and sys.platform == "linux"
              and platform.machine() == "x86_64" and glibc >= [2, 31]))' 2>/dev/null
}

all_requirements() { cat requirements.txt requirements.lock requirements-cuda.lock; }

install_requirements() {
    local pins=requirements.txt cuda=requirements.txt torch=() page=https://download.pytorch.org/whl/cpu/torch/
    if lock_applies; then
        pins=requirements.lock
        cuda=requirements-cuda.lock
    fi
    # Without an NVIDIA GPU, torch's CPU build does, a tenth of the size. The page lists torch alone, and is asked for
    # only if its server answers. Of a Python whose CPU build the lock does not know, the lock has CUDA.
    if command -v nvidia-smi >/dev/null; then
        pins=$cuda
    elif python -c "import urllib.request; urllib.request.urlopen('$page', timeout=5)" 2>/dev/null; then
        torch=(--find-links "$page")
        ! grep -q "^triton.*\"$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')\"" requirements.lock ||
            pins=requirements.txt
    fi
    echo "Installing $pins (once; some minutes)"
    python -m pip install --quiet "${torch[@]+"${torch[@]}"}" -r "$pins" || python -m pip install --quiet -r "$cuda"
    all_requirements >.venv/installed-requirements.txt
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
    all_requirements | cmp -s - .venv/installed-requirements.txt || install_requirements
fi
