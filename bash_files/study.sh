# Sourced by study_*.sh: run_study SCRIPT [OPTIONS] sets up and runs a script of this repository in the caller's folder.
run_study() {
    local here=$PWD root
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
    root=$PWD
    cd "$here"   # paths among the options are the caller's
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that wait leave the cores to others
    exec python "$root/$1" "${@:2}"
}
