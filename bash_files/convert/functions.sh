# Shared by convert_1c.sh, convert_5c.sh and convert_10c.sh, which set the variables.

# The ten classes of each similarity level; the first is common to all.
case "$SIM" in
    sim3) CLASSES=(171 182 198 208 215 231 236 244 245 258) ;;
    sim2) CLASSES=(171 269 279 283 294 330 340 366 370 386) ;;
    sim1) CLASSES=(171 1 18 31 46 532 579 609 849 980) ;;
    *) echo "Error: similarity level '$SIM' is unknown; give sim3, sim2 or sim1" >&2; exit 1 ;;
esac

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
