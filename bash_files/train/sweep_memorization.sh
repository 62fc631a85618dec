#!/usr/bin/env bash
# The memorization study on CIFAR-10 (arXiv 2310.02664): one factor at a time, at each size of the data, a data set, a
# run of train.py, and the ratio of all its snapshots. The last ratio of each run is a line of $RUNS/ratios.tsv; what
# is there is skipped, and what was stopped goes on.
#
#     [NAME=VALUE ...] bash bash_files/train/sweep_memorization.sh [--list] [FACTOR ...]
#
#     FACTOR   size dimension classes mixture width depth embedding batch decay ema labels    [default: all]
#     --list   names the runs and what they train on, and starts nothing
#
#     GPUS=2 SIZES="1000 2000" bash bash_files/train/sweep_memorization.sh width depth
#     SHARE=0/4 bash bash_files/train/sweep_memorization.sh        # every fourth run, from the first: on four machines
#     SEEDS="0 1 2" EXTRA=--precision=bf16 bash bash_files/train/sweep_memorization.sh --list
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

FACTORS="size dimension classes mixture width depth embedding batch decay ema labels"
CIFAR=${CIFAR:-datasets/cifar10/cifar-10-python.tar.gz}
SETS=${SETS:-datasets/cifar10/sweep}                # data sets, made when a run needs them
DOGS=${DOGS:-datasets}                              # $DOGS/cifar10/cifar10_dog_N-32x32.zip and its imagenet twin, for mixtures
RUNS=${RUNS:-training-runs/memorization}
SIZES=${SIZES:-1000 2000 5000 10000 20000}          # training images
SEEDS=${SEEDS:-1024}
SAMPLES=${SAMPLES:-10000}                           # images of which the ratio is taken
DURATION=${DURATION:-2000}                          # millions of images for a set of 50,000, see train.py
GPUS=${GPUS:-8}                                     # processes on this machine
SHARE=${SHARE:-0/1}                                 # INDEX/COUNT: which of the runs are done here

# runs FACTOR SIZE: a line 'VALUE SET OPTIONS' for each run of a factor; the first is that of every factor
runs() {
    local value n=$2 base="cifar10-32x32-$2"
    case "$1" in
        size) echo "base $base" ;;
        dimension) for value in 16 8; do
            echo "${value}x$value cifar10-${value}x$value-$n --attn-resolutions=$((value / 2))"; done ;;
        classes) for value in 1 2 5; do echo "$value cifar10-classes$value-$n"; done ;;
        mixture) for value in 0.0 0.2 0.5 0.8 1.0; do echo "$value mixture_${value}_$n"; done ;;
        width) for value in 192 256 320; do echo "$value $base --num-channels=$value"; done ;;
        depth) for value in 4 6 8 10 12; do echo "$value $base --num-blocks=$value"; done ;;
        embedding) echo "fourier $base --embed=fourier" ;;
        batch) for value in 128 256 384 640 768 896; do echo "$value $base --batch=$value"; done ;;
        decay) for value in 1e-5 1e-4 1e-3 1e-2; do echo "$value $base --weight-decay=$value"; done ;;
        ema) for value in 0 0.9 0.99 0.999; do echo "$value $base --ema_mode=mode4 --final-ema=$value"; done ;;
        labels)
            echo "true $base --cond=1"
            for value in 1 10 100 1000; do echo "random$value cifar10-random$value-$n --cond=1"; done
            echo "unique cifar10-unique-$n --cond=1" ;;
        *) echo "Error: a factor must be one of: $FACTORS, not $1" >&2; return 1 ;;
    esac
}

# make_set NAME SIZE: $SETS/NAME.zip, unless it is there. Each share writes its own file, which then gets the name.
make_set() {
    local tool options name=$1 n=$2 part made="$SETS/$1.share${SHARE%/*}.zip"
    if [[ -e "$SETS/$name.zip" ]]; then return; fi
    case "$name" in
        cifar10-classes*) part=${name#cifar10-classes}; tool=diversity; options=--num-classes=${part%%-*} ;;
        cifar10-random*) part=${name#cifar10-random}; tool=random; options=--num-classes=${part%%-*} ;;
        cifar10-unique*) tool=unique; options= ;;
        cifar10-*) part=${name#cifar10-}; tool=size; options=--resolution=${part%%-*} ;;
        mixture_*)
            part=${name#mixture_}
            set -- intra_diversity --source="$DOGS/cifar10/cifar10_dog_$n-32x32.zip" --inter-rate="${part%%_*}" ;;
    esac
    if [[ "$name" == cifar10-* ]]; then set -- "dataset_$tool" --source="$CIFAR" $options; fi
    "$PYTHON" "data_utils/$1.py" --dest="$made" --overwrite --max-images="$n" "${@:2}" && mv "$made" "$SETS/$name.zip"
}

# one_run NAME SET SIZE SEED [OPTIONS]: trains, measures, and adds 'NAME RATIO' to the table
one_run() {
    local run="$RUNS/$1" name=$1 set=$2 size=$3 seed=$4 attention=--attn-resolutions=16
    shift 4
    if [[ "$*" == *--attn-resolutions* ]]; then attention=; fi
    make_set "$set" "$size" || return
    launch train.py --outdir="$run" --nosubdir --data="$SETS/$set.zip" --arch=ddpmpp --precond=vp --augment=0 \
        --window-size=0 --duration="$DURATION" --num-blocks=2 --num-channels=128 --lr=2e-4 --seed="$seed" \
        $attention "$@" $EXTRA || return
    launch mem_ratio.py --expdir="$run" --seeds="0-$((SAMPLES - 1))" || return
    printf '%s\t%s\n' "$name" "$("$PYTHON" -c '
import json, sys
print(json.load(open(sys.argv[1]))["snapshots"][-1]["memorization_ratio"])' "$run/mem_ratio.json")" >>"$RUNS/ratios.tsv"
}

list=
if [[ "${1-}" == --list ]]; then list=1; shift; fi
number=0 failed=0
mkdir -p "$RUNS"
for factor in ${*:-$FACTORS}; do
    runs "$factor" 1 >/dev/null
    for size in $SIZES; do
        while read -r value set options; do
            for seed in $SEEDS; do
                name=$factor-$value-$size-seed$seed
                if (( number++ % ${SHARE#*/} != ${SHARE%/*} )); then continue; fi
                if [[ -n "$list" ]]; then
                    echo "$name $set $options"
                elif ! cut -f1 "$RUNS/ratios.tsv" 2>/dev/null | grep -qxF -- "$name"; then
                    one_run "$name" "$set" "$size" "$seed" $options </dev/null || { echo "Error: $name failed" >&2; failed=1; }
                fi
            done
        done < <(runs "$factor" "$size")
    done
done
exit $failed
