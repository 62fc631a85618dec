# Shared by convert_1c.sh, convert_5c.sh and convert_10c.sh, which set the variables.

source bash_files/classes.sh
CLASS_LIST=$(similarity_classes "$SIM")   # apart from the next line, so that an unknown level ends the script
read -ra CLASSES <<<"$CLASS_LIST"

join() { local IFS=,; echo "$*"; }

# make NAME CLASS_LIST IMAGES_PER_CLASS: pixels, then latents. What exists is kept, so a stopped script goes on.
make() {
    local pixels="$PIXELS/$1.zip" latents="$LATENTS/$1.zip"
    if [[ ! -e "$pixels" ]]; then
        "$PYTHON" dataset_tool.py convert --source="$SOURCE" --dest="$pixels" \
            --resolution="${RESOLUTION}x${RESOLUTION}" --transform=center-crop-dhariwal \
            --class_labels="$2" --nums="$3" --sim_name="$SIM" --seed="$SEED"
    fi
    if [[ ! -e "$latents" ]]; then
        local launcher=()
        if (( GPUS > 1 )); then launcher=(-m torch.distributed.run --standalone --nproc_per_node="$GPUS"); fi
        "$PYTHON" ${launcher[@]+"${launcher[@]}"} dataset_tool.py encode \
            --source="$pixels" --dest="$latents" --model-url="$VAE"
    fi
}
