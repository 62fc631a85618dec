#!/usr/bin/env bash
# From nothing to a trained model, on any CPU: handwritten digits, the EDM2 recipe, samples, metrics.
# bash bash_files/quickstart.sh [DIR]   results go to DIR, by default training-runs/quickstart
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../training-runs/quickstart}")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that wait leave the cores to others
start=$SECONDS

echo '== 1/4 A data set: 1,797 handwritten digits that come with scikit-learn'
[ -f "$out/digits.zip" ] || python dataset_tool.py convert --source=digits --dest="$out/digits.zip"

echo '== 2/4 Training, class-conditional, on this machine'
python train_edm2.py --outdir="$out/run" --data="$out/digits.zip" --preset=digits

echo '== 3/4 500 samples, and a picture of the first of each class'
net=$(ls "$out"/run/network-snapshot-*-0.100.pkl | tail -n 1)
python generate_images.py --net="$net" --outdir="$out/samples" --grid="$out/samples.png" --seeds=0-499 --batch=100 --steps=24

echo '== 4/4 Metrics: distance to the real digits, and how many samples are recognised as their class'
python calculate_metrics.py calc --images="$out/samples" --ref="$out/digits.zip" --metrics=fd_pixels,recognition \
    --num=500 --dest="$out/metrics.json"

cat <<END

Done in $((SECONDS - start)) s. Look at
  $out/samples.png    samples, a row for each class
  $out/run/loss.png   the loss
  $out/metrics.json   the metrics
  tensorboard --logdir $out/run
Next: README.md has the five studies and how to train on GPUs.
END
