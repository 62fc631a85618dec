# Sourced by the scripts in convert/, train/ and generate/: the multi-source study on ImageNet (arXiv 2502.14583).
# Every variable that has a default here can be set from outside, e.g.
# GPUS=2 BATCH=2048 bash bash_files/train/train_10c_1000.sh sim2
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# The ten ImageNet classes of each similarity level; 171 is in all.
similarity_classes() {
    case "$1" in
        sim3) echo 171 182 198 208 215 231 236 244 245 258 ;;
        sim2) echo 171 269 279 283 294 330 340 366 370 386 ;;
        sim1) echo 171 1 18 31 46 532 579 609 849 980 ;;
        *) echo "Error: the similarity level must be sim1, sim2 or sim3, not $1" >&2; return 1 ;;
    esac
}

SIM=${1:-sim3}                                      # similarity level
LEVEL=$(similarity_classes "$SIM")
LATENTS=${LATENTS:-datasets/latent_datasets/$SIM}   # made by convert/
RUNS=${RUNS:-training-runs}                         # made by train/
REFS=${REFS:-dataset-refs/$SIM}                     # reference statistics, made by convert/convert_1c.sh
METRICS=${METRICS-fid}                              # what generate/ measures; METRICS= for nothing

first_classes() { cut -d' ' -f"1-$1" <<<"$LEVEL"; }

# convert_sets COUNT: data sets of COUNT classes, for COUNT = 1 one of each class and, for the class that all levels
# share, a link without its number; with COUNT = 1 also the statistics $METRICS need, of each class. What exists is
# kept, so a stopped script goes on.
convert_sets() {
    SOURCE=${SOURCE:-downloads/imagenet/train}          # folder with a folder for each wnid
    PIXELS=${PIXELS:-datasets/img_datasets/$SIM}        # where the pictures go; latents go to $LATENTS
    VAE=${VAE:-${SD_VAE:-stabilityai/sd-vae-ft-mse}}    # autoencoder: hub name or local folder
    NUMS=${NUMS:-100 500 1000}                          # images per class
    RESOLUTION=${RESOLUTION:-256}
    SEED=${SEED:-0}                                     # which images are drawn
    GPUS=${GPUS:-1}                                     # processes that encode
    local num class folder
    for num in $NUMS; do
        if (( $1 > 1 )); then
            convert_set "inet-$RESOLUTION-${1}c-$num" "$(first_classes "$1" | tr ' ' ,)" "$num"
            continue
        fi
        for class in $LEVEL; do
            convert_set "inet-$RESOLUTION-1c-$class-$num" "$class" "$num"
            reference_of "inet-$RESOLUTION-1c-$class-$num"
        done
        for folder in "$PIXELS" "$LATENTS"; do
            ln -sfn "inet-$RESOLUTION-1c-${LEVEL%% *}-$num.zip" "$folder/inet-$RESOLUTION-1c-$num.zip"
        done
    done
}

# convert_set NAME CLASS_LIST IMAGES_PER_CLASS: pixels, then latents
convert_set() {
    local pixels="$PIXELS/$1.zip" latents="$LATENTS/$1.zip" launcher=()
    if [[ ! -e "$pixels" ]]; then
        "$PYTHON" dataset_tool.py convert --source="$SOURCE" --dest="$pixels" \
            --resolution="${RESOLUTION}x${RESOLUTION}" --transform=center-crop-dhariwal \
            --class_labels="$2" --nums="$3" --sim_name="$SIM" --seed="$SEED"
    fi
    if [[ ! -e "$latents" ]]; then
        if (( GPUS > 1 )); then launcher=(-m torch.distributed.run --standalone --nproc_per_node="$GPUS"); fi
        "$PYTHON" ${launcher[@]+"${launcher[@]}"} dataset_tool.py encode \
            --source="$pixels" --dest="$latents" --model-url="$VAE"
    fi
}

# reference_of NAME: statistics of the pictures of a data set
reference_of() {
    local ref="$REFS/$1.pkl"
    if [[ -n "$METRICS" && ! -e "$ref" ]]; then
        "$PYTHON" calculate_metrics.py ref --data="$PIXELS/$1.zip" --dest="$ref" --metrics="$METRICS"
    fi
}

# train_models COUNT: a model of COUNT classes, 1000 images of each; for COUNT = 1 one of each class in $CLASSES
train_models() {
    CLASSES=${CLASSES:-$LEVEL}                          # ImageNet indices, for models of one class
    PRESET=${PRESET:-edm2-img256-xs-${1}c-1000}
    GPUS=${GPUS:-8}                                     # processes on this machine
    BATCH=${BATCH:-$((1024 * 8))}                       # images of one step over all GPUs
    local set sets=10c
    if (( $1 == 1 )); then sets=$(printf '1c-%s ' $CLASSES); fi
    for set in $sets; do
        launch train_edm2.py --outdir="$RUNS/$SIM-edm2-img256-xs-$set-1000" --data="$LATENTS/inet-256-$set-1000.zip" \
            --preset="$PRESET" --batch="$BATCH" --status=64Ki --snapshot=16Mi --checkpoint=64Mi $EXTRA
    done
}

# generate_classes COUNT: images of each class, from the model of COUNT classes; for COUNT = 1 from that of the class.
# Each class is measured against its training pictures, and the numbers are added to $OUT/$SIM-<COUNT>c-$NUM/fids.txt.
generate_classes() {
    local count=$(( $1 > 1 ? $1 : 10 )) class set net
    CLASSES=${CLASSES:-$(first_classes "$count")}       # ImageNet indices
    NUM=${NUM:-1000}                                    # training images of each class
    OUT=${OUT:-generated}                               # where the images go
    STD=${STD:-0.050}                                   # EMA width of the snapshot
    SEEDS=${SEEDS:-0-4999}                              # images of each class
    BATCH=${BATCH:-64}                                  # images at a time on each GPU
    GPUS=${GPUS:-8}                                     # processes on this machine
    for class in $CLASSES; do
        if [[ -n "$METRICS" && ! -e "$REFS/inet-256-1c-$class-$NUM.pkl" ]]; then
            echo "Error: no statistics $REFS/inet-256-1c-$class-$NUM.pkl; make them with" \
                "bash_files/convert/convert_1c.sh $SIM, or set METRICS= to measure nothing" >&2
            exit 1
        fi
    done
    for class in $CLASSES; do
        set=${1}c
        if (( $1 == 1 )); then set=1c-$class; fi
        run="$RUNS/$SIM-edm2-img256-xs-$set-$NUM"
        net=$(ls "$run"/network-snapshot-*-"$STD".pkl 2>/dev/null | tail -n 1) ||
            { echo "Error: no snapshot of width $STD in $run; train it with bash_files/train first" >&2; exit 1; }
        out="$OUT/$SIM-${1}c-$NUM"
        launch generate_images.py --net="$net" --class="$class" --outdir="$out/$class" --subdirs \
            --seeds="$SEEDS" --batch="$BATCH" $EXTRA
        measure_class "$out" "$class" "$net"
    done
}

# measure_class FOLDER CLASS NETWORK: adds 'CLASS NETWORK fid 12.3 ...' to FOLDER/fids.txt, unless it is there
measure_class() {
    local ref="$REFS/inet-256-1c-$2-$NUM.pkl" numbers line
    if [[ -z "$METRICS" ]]; then return; fi
    if [[ -e "$1/fids.txt" ]]; then
        while read -r line; do
            if [[ "$line" == "$2 $3 "* ]]; then return; fi
        done <"$1/fids.txt"
    fi
    numbers=$(launch calculate_metrics.py calc --images="$1/$2" --ref="$ref" --metrics="$METRICS")
    echo "$numbers"
    echo "$2 $3 $(tr -s ' \n' ' ' <<<"$numbers")" >>"$1/fids.txt"
}
