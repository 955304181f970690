#!/usr/bin/env bash
# Every experiment as plain commands. Finished work is skipped and stopped work goes on, so it can be started again.
#
#   bash run_all.sh          the demo: DDPM, OC and CM on long-tailed digits, about 10 minutes on two CPU cores
#   bash run_all.sh smoke    the demo's whole path with a few steps of everything, about a minute
#
# Results: out/demo/report.md (out/smoke/report.md).
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONUNBUFFERED=1

case "${1:-demo}" in
  demo)  OUT=out/demo;  STEPS=2000; NUM=2000; EPOCHS=30; DDIM=50 ;;
  smoke) OUT=out/smoke; STEPS=8;    NUM=100;  EPOCHS=1;  DDIM=3; rm -rf out/smoke ;;
  *) echo "error: unknown target '$1'; choose demo or smoke" >&2; exit 2 ;;
esac

# The feature classifier, on the balanced training set
python classify.py --dataset digits --epochs $EPOCHS --out $OUT/classifier --if-needed

# DDPM, OC, and CM on OC (the paper's default); a run whose step equals its steps is finished
python train.py --dataset digits --steps $STEPS --base ddpm --no-cm --out $OUT/ddpm
python train.py --dataset digits --steps $STEPS --base oc --no-cm --out $OUT/oc
python train.py --dataset digits --steps $STEPS --base oc --cm --out $OUT/cm

# Samples of each, and of theta_g alone from the same noise, without and with guidance; then the numbers
ROWS=()
for OMEGA in 0 1.5; do
  while read -r RUN BRANCH NAME; do
    DIR=$OUT/$RUN/$BRANCH-$OMEGA
    python sample.py --ckpt $OUT/$RUN/ckpt.pt --branch $BRANCH --guidance $OMEGA --num $NUM --steps $DDIM --out $DIR --if-needed
    python evaluate.py --samples $DIR/samples.npz --features $OUT/classifier/ckpt.pt --floor 10 --if-needed
    ROWS+=(--row "$NAME=$DIR/eval.json")
  done <<< "ddpm full DDPM
oc full OC
cm full CM
cm general CM, theta_g alone"
done

python report.py --out $OUT/report.md "${ROWS[@]}" --pair $OUT/cm/general-1.5/samples.npz $OUT/cm/full-1.5/samples.npz
