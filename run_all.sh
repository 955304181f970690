#!/usr/bin/env bash
# Every experiment as plain commands. Finished work is skipped and stopped work goes on, so it can be started again.
#
#   bash run_all.sh          the demo: DDPM, OC and CM on long-tailed digits, 9 minutes on two CPU cores
#   bash run_all.sh smoke    the demo's whole path with a few steps of everything, a minute
#   bash run_all.sh table2   one of the paper's tables; out/table2/SETTING/report.md has its numbers beside the paper's
#
# Tables: table1 table2 table3 table4 table5 table6 table7 tableE2 tableG8 tableG9 tableG10 tableG12 tableG13; figures: fig1b fig4a fig4b fig4c fig4d; and
# theory, allocation, dominance, gain. They share their runs (out/paper). From the environment, with the defaults:
#   DATASET=cifar100 IR=100 SEEDS=0,1,2 NGPU=1 DATA_DIR=data RESOLUTION= CLASS_ORDER=   SCALE=paper, or SCALE=demo: on digits, in minutes
# and, for a budget of your own, runs and pages in a folder of their own: ROOT=out/mine STEPS=20000 FLAGS="--ch 64 --lr 5e-4"
# (of train.py) CM_FLAGS="--w-div 0.2" (of its runs with --cm) NUM=10000 FEATURES=CKPT (of classify.py; without it, Inception);
# of tableG8 and tableG13: EPOCHS=200 EXTRA=50000; of table6: EPOCHS=100 MODEL=. The demo and the smoke run take none of these.
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONUNBUFFERED=1
TARGET=${1:-demo}

# ----------------------------------------------------------------------------------------------------------------------
if [[ $TARGET == demo || $TARGET == smoke ]]; then
  case $TARGET in
    demo)  OUT=out/demo;  STEPS=2000; NUM=2000; EPOCHS=30; DDIM=50; REPEATS=10; TRIALS=20000; GRIDS=500 ;;
    smoke) OUT=out/smoke; STEPS=8;    NUM=100;  EPOCHS=1;  DDIM=3;  REPEATS=1;  TRIALS=500;   GRIDS=0; rm -rf out/smoke ;;
  esac

  # The feature classifier, on the balanced training set
  python classify.py --dataset digits --epochs $EPOCHS --out $OUT/classifier --if-needed

  # DDPM, OC, and CM on OC (the paper's default); a run whose step equals its steps is finished
  python train.py --dataset digits --steps $STEPS --base ddpm --no-cm --sample-every $GRIDS --out $OUT/ddpm
  python train.py --dataset digits --steps $STEPS --base oc --no-cm --sample-every $GRIDS --out $OUT/oc
  python train.py --dataset digits --steps $STEPS --base oc --cm --sample-every $GRIDS --out $OUT/cm

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
cm full CM (on OC)
cm general CM, theta_g alone"
  done

  python report.py --out $OUT/report.md "${ROWS[@]}" --pair $OUT/cm/general-1.5/samples.npz $OUT/cm/full-1.5/samples.npz

  # Why: the pruning probe of Fig. 1(b), where CM's reserved part works, and the theorems against simulation
  python prune_probe.py --ckpt $OUT/ddpm/ckpt.pt $OUT/cm/ckpt.pt --fractions 0.1,0.2,0.3 --repeats $REPEATS --out $OUT/prune
  python capacity_probe.py allocation --ckpt $OUT/cm/ckpt.pt --quality $OUT/cm/full-1.5/eval.json $OUT/cm/general-1.5/eval.json
  python theory_sim.py --trials $TRIALS --out $OUT/theory
  exit
fi

# ----------------------------------------------------------------------------------------------------------------------
# The paper's tables

SCALE=${SCALE:-paper}; PAGES=${ROOT:-out}
if [[ $SCALE == demo ]]; then
  if [[ ${DATASET:-digits} != digits ]]; then echo "error: SCALE=demo is on digits; for DATASET=$DATASET name a budget with STEPS and NUM" >&2; exit 2; fi
  DATASET=digits; IR=${IR:-20}; SEEDS=${SEEDS:-0}; ROOT=${ROOT:-out/paper-demo}; STEPS=${STEPS:-300}; NUM=${NUM:-500}
  FLAGS="--sample-every 0 ${FLAGS:-}"; FEATURES=$ROOT/classifier/ckpt.pt; EPOCHS=${EPOCHS:-60}; EXTRA=${EXTRA:-500}
  python classify.py --dataset digits --epochs 10 --out "$ROOT/classifier" --if-needed
else
  case $TARGET in
    table4) DATASET=${DATASET:-celebahq} ;;
    table5) DATASET=${DATASET:-imagenet-lt} ;;
    table6) DATASET=${DATASET:-artbench10} ;;
    *) DATASET=${DATASET:-cifar100} ;;
  esac
  case $DATASET in folder) IR=${IR:-1} ;; cub200 | flowers102) IR=${IR:-10} ;; *) IR=${IR:-100} ;; esac       # as train.py's defaults
  SEEDS=${SEEDS:-0,1,2}; ROOT=${ROOT:-out/paper}
fi
TRAIN="${STEPS:+--steps $STEPS} ${FLAGS:-}"; EVALUATE=(${NUM:+--num $NUM} ${FEATURES:+--features "$FEATURES"})
SETTING=$DATASET-ir$IR${RESOLUTION:+-$RESOLUTION}
if [[ $DATASET == imagenet-lt || $DATASET == inat2018 ]]; then IR=1; RESOLUTION=${RESOLUTION:-64}; SETTING=$DATASET-$RESOLUTION; fi
case $TARGET in fig1b | dominance | allocation) SEEDS=${SEEDS%%,*} ;; esac       # which look at one network each
DATA=(--dataset $DATASET --ir $IR --data-dir "${DATA_DIR:-data}" ${RESOLUTION:+--resolution $RESOLUTION}
      ${CLASS_ORDER:+--class-order "$CLASS_ORDER"})
PYTHON=python; if (( ${NGPU:-1} > 1 )); then PYTHON="torchrun --nproc_per_node=$NGPU --"; fi
ROWS=()

# row NAME RUN [train flags] [-- evaluate flags]: train and evaluate each seed of a run, and make it a row of the table
row() {
  local name=$1 run=$2 train=() extra=() seed out json cm_flags; shift 2
  while (( $# )) && [[ $1 != -- ]]; do train+=("${1}"); shift; done
  if (( $# )); then shift; extra=("$@"); fi
  case " ${train[*]-} " in *" --cm "*) cm_flags=${CM_FLAGS:-} ;; *) cm_flags= ;; esac
  json=eval-$(echo "${extra[*]:-plain}" | tr -c 'a-z0-9.\n' _).json
  for seed in ${SEEDS//,/ }; do
    out=$ROOT/$SETTING/$run-seed$seed
    $PYTHON train.py "${DATA[@]}" $TRAIN ${train[@]+"${train[@]//@SEED/$seed}"} $cm_flags --seed $seed --out "$out"
    case $TARGET in fig1b | dominance) continue ;; esac               # which need no samples
    $PYTHON evaluate.py --ckpt "$out/ckpt.pt" ${EVALUATE[@]+"${EVALUATE[@]}"} ${extra[@]+"${extra[@]}"} --out-json "$out/$json" --if-needed
  done
  ROWS+=(--row "$name=$(printf "$ROOT/$SETTING/$run-seed%s/$json," ${SEEDS//,/ })")
}

# page TABLE: the table's page from the rows so far
page() {
  python report.py --paper $1 --setting $SETTING "${ROWS[@]}" --out "$PAGES/$TARGET/$SETTING/${2:-report}.md"
  ROWS=()
}

ddpm() { row DDPM ddpm --base ddpm --no-cm "$@"; }
cbdm() { row CBDM cbdm --base cbdm --no-cm "$@"; }
oc()   { row OC oc --base oc --no-cm "$@"; }
cm()   { row CM cm --base oc --cm "$@"; }

# classes NAME SLUG [flags]: classify.py for each seed, and a row of the table
classes() {
  local name=$1 slug=$2 seed; shift 2
  for seed in ${SEEDS//,/ }; do
    python classify.py "${DATA[@]}" ${EPOCHS:+--epochs $EPOCHS} "${@//@SEED/$seed}" --seed $seed \
      --out "$ROOT/$SETTING/classify-$slug-seed$seed" --if-needed
  done
  ROWS+=(--row "$name=$(printf "$ROOT/$SETTING/classify-$slug-seed%s/result.json," ${SEEDS//,/ })")
}

# latent NAME RUN [flags]: fine-tune Stable Diffusion, sample and evaluate for each seed, and a row of the table
latent() {
  local name=$1 run=$2 seed out; shift 2
  for seed in ${SEEDS//,/ }; do
    out=$ROOT/$SETTING/latent-$run-seed$seed
    $PYTHON latent.py train "${DATA[@]}" ${MODEL:+--model "$MODEL"} ${EPOCHS:+--epochs $EPOCHS} "$@" --seed $seed --out "$out"
    $PYTHON latent.py sample --ckpt "$out/ckpt.pt" --num ${NUM:-50000} --out "$out/samples" --if-needed
    $PYTHON evaluate.py --samples "$out/samples/samples.npz" --data-dir "${DATA_DIR:-data}" ${EVALUATE[@]+"${EVALUATE[@]}"} --if-needed
  done
  ROWS+=(--row "$name=$(printf "$ROOT/$SETTING/latent-$run-seed%s/samples/eval.json," ${SEEDS//,/ })")
}

case $TARGET in
  table6)       # and G.3: Stable Diffusion on ArtBench-10 (pip install diffusers transformers; MODEL=miniSD's folder or hub name)
    if [[ $SCALE == demo ]]; then echo "error: table6 fine-tunes Stable Diffusion; there is no demo of it" >&2; exit 2; fi
    latent DDPM ddpm --base ddpm --no-cm; latent CBDM cbdm --base cbdm --no-cm
    latent OC oc --base oc --no-cm; latent CM cm --base oc --cm; page table6 ;;
  tableG8)      # downstream classification with 50,000 generated images
    classes "No augmentation" plain
    for S in ${SEEDS//,/ }; do
      for R in "ddpm --base ddpm --no-cm" "cm --base oc --cm"; do
        RUN=$ROOT/$SETTING/${R%% *}-seed$S
        if [[ $R == *--cm ]]; then R="$R ${CM_FLAGS:-}"; fi
        $PYTHON train.py "${DATA[@]}" $TRAIN ${R#* } --seed $S --out "$RUN"
        $PYTHON sample.py --ckpt "$RUN/ckpt.pt" --num ${EXTRA:-50000} --seed $S --out "$RUN/extra" --if-needed
      done
    done
    classes DDPM ddpm --extra "$ROOT/$SETTING/ddpm-seed@SEED/extra/samples.npz"
    classes CM cm --extra "$ROOT/$SETTING/cm-seed@SEED/extra/samples.npz"
    page tableG8 ;;
  tableG13)     # long-tailed recognition (also IR=200)
    classes CE ce --loss ce
    classes "CE + CM" ce-cm --loss ce --cm
    classes LDAM ldam --loss ldam --drw
    classes "LDAM + CM" ldam-cm --loss ldam --drw --cm
    classes LA la --loss la
    classes "LA + CM" la-cm --loss la --cm
    page tableG13 ;;
  fig1b)        # and G.1, G.2: what pruning does to each class
    ddpm; cm
    python prune_probe.py --ckpt "$ROOT/$SETTING"/{ddpm,cm}-seed${SEEDS%%,*}/ckpt.pt --fractions 0.05,0.1,0.2,0.3 --out "$PAGES/fig1b/$SETTING" ;;
  theory)       # Theorems 2.1, 3.1, F.1, F.2 against simulation
    python theory_sim.py --out "$PAGES/theory" ;;
  dominance)    # Theorem 2.1's question on a trained network's gradients
    ddpm; cm
    for R in ddpm cm; do python capacity_probe.py dominance --ckpt "$ROOT/$SETTING/$R-seed${SEEDS%%,*}/ckpt.pt"; done ;;
  gain)         # not in the paper: what CM adds to DDPM and to OC, seed by seed, without and with guidance
    for OMEGA in 0 1.5; do
      ddpm -- --guidance $OMEGA; row "CM on DDPM" cm-ddpm --base ddpm --cm -- --guidance $OMEGA
      oc -- --guidance $OMEGA; cm -- --guidance $OMEGA; page table3 guidance-$OMEGA
    done ;;
  allocation)   # what the reserved part is and does
    row "CM (theta_g)" cm --base oc --cm -- --branch general; cm
    CM=$ROOT/$SETTING/cm-seed${SEEDS%%,*}
    python capacity_probe.py allocation --ckpt "$CM/ckpt.pt" --quality "$CM/eval-plain.json" "$CM/eval-__branch_general.json" ;;
  table1)       # low-rank variants of CBDM
    ddpm; cbdm
    row "CBDM (theta_g + theta_e)" cbdm-low-rank --base cbdm --cm --lam 0
    row "CBDM (LoRA)" cbdm-lora --base cbdm --lora --init-from "$ROOT/$SETTING/cbdm-seed@SEED/ckpt.pt"
    cm; page table1 ;;
  table2)       # and G.1: all baselines
    ddpm
    row +ADA ada --base ddpm --no-cm --ada 0.12
    row +RS rs --base ddpm --no-cm --resample 0.5
    row +Focal focal --base focal --no-cm
    cbdm; oc; cm; page table2 ;;
  table3)       # and G.4, Figure 2(c): per split
    ddpm; cbdm; oc; cm; page table3 ;;
  table4)       # and G.2: CelebA-HQ, per class (DATASET=celebahq)
    ddpm -- --per-class; cbdm -- --per-class; oc -- --per-class; cm -- --per-class; page table4 ;;
  table5)       # thousands of classes (DATASET=imagenet-lt or inat2018, RESOLUTION=32 or 64)
    ddpm; cbdm; oc; cm; page table5 ;;
  table7)       # and G.5, G.6: theta_g alone; without either term
    ddpm; row "CM (theta_g)" cm --base oc --cm -- --branch general; cm; page table7-left theta_g
    ddpm; oc; cm
    row "CM w/o L_Con" cm-no-con --base oc --cm --w-con 0
    row "CM w/o L_Div" cm-no-div --base oc --cm --w-div 0
    page table7-right ;;
  tableE2)      # one low-rank expert a group
    ddpm; row "Group-Expert LoRA" experts --base ddpm --no-cm --experts group; cm; page tableE2 ;;
  tableG9)      # consistency models
    row "Consistency model" consistency --base consistency --no-cm
    row "CM on Consistency model" cm-consistency --base consistency --cm; page tableG9 ;;
  tableG10)     # DPM-Solver, 15 steps
    ddpm -- --sampler dpm++; cm -- --sampler dpm++; page tableG10 ;;
  tableG12)     # overlap optimisation
    ddpm; row "Overlap Opt." rop --base rop --no-cm; cm; page tableG12 ;;
  fig4a)        # CM on each baseline
    ddpm; row "CM on DDPM" cm-ddpm --base ddpm --cm
    row +ADA ada --base ddpm --no-cm --ada 0.12; row "CM on +ADA" cm-ada --base ddpm --cm --ada 0.12
    row +RS rs --base ddpm --no-cm --resample 0.5; row "CM on +RS" cm-rs --base ddpm --cm --resample 0.5
    row +Focal focal --base focal --no-cm; row "CM on +Focal" cm-focal --base focal --cm
    cbdm; row "CM on CBDM" cm-cbdm --base cbdm --cm
    oc; cm; page fig4a ;;
  fig4b)        # and G.3: lambda, which is 1 in CM
    oc; for L in 0 0.5 0.8 1.2 1.5; do row "lambda $L" cm-lam$L --base oc --cm --lam $L; done; cm; page fig4b ;;
  fig4c)        # rank ratio, which is 0.1 in CM
    oc; for R in 0.05 0.2 0.3 0.5; do row "rank $R" cm-rank$R --base oc --cm --rank-ratio $R; done; cm; page fig4c ;;
  fig4d)        # network widths
    for M in "1 2 2" "1 2 2 2" "1 2 3 4"; do
      WIDTH=-mult${M// /}; if [[ $SCALE$M == "paper1 2 2 2" && ${FLAGS:-} != *--ch-mult* ]]; then WIDTH=; fi      # the paper's own: the runs of table2
      row "OC, $M" oc$WIDTH --base oc --no-cm --ch-mult $M
      row "CM, $M" cm$WIDTH --base oc --cm --ch-mult $M
    done; page fig4d ;;
  *) echo "error: unknown target '$TARGET'; see the head of run_all.sh" >&2; exit 2 ;;
esac
