#!/usr/bin/env bash
# Every experiment as plain commands. What is finished is skipped and what was stopped is resumed,
# so it is safe to start this script again; pages and pictures are made anew, in seconds. Where a
# run fails, the others go on, its row is marked, and the exit code is 1.
#
#   bash run_all.sh            the demo: DDPM, and CM on it, on long-tailed digits;
#                              about five minutes on two CPU cores
#   bash run_all.sh demo-full  a larger network, also OC and CM on it, guidance, pruning
#   bash run_all.sh smoke      the commands of both with a few steps of everything: two minutes
#   bash run_all.sh tests      the lint and the tests
#   bash run_all.sh table2     one of the paper's tables; out/table2/SETTING/report.md shows its
#                              numbers with the paper's beside them
#
# It needs Python 3.10 or later. Where the packages are missing, it installs them into .venv first.
#
# Targets:
#   tables     table1 table2 table3 table4 table5 table6 table7
#              tableE2 tableG7 tableG8 tableG9 tableG10 tableG11 tableG12 tableG13
#   figures    fig1b fig4a fig4b fig4c fig4d figures (1(a), 3, G.4 to G.12: samples)
#   others     theory allocation dominance gain curves pictures
# They share their runs, which are in out/paper.
#
# Environment variables of these targets (the demo and the smoke run take none of them):
#
#   variable      default     meaning
#   DATASET       cifar100    the data set (table4: celebahq; table5: imagenet-lt; table6, tableG7:
#                             artbench10; tableG11: all); all: each setting that the paper has
#   IR            100         the imbalance ratio (cub200, flowers102: 10; folder: 1)
#   SEEDS         0,1,2       one run per seed
#   NGPU          1           how many GPUs; more than one: torchrun
#   DATA_DIR      data        where the data set is
#   PRESET        paper       small or tiny: smaller networks, fewer steps (see train.py)
#   RESOLUTION                the images' size in pixels (if not given: the set's own)
#   CLASS_ORDER               all classes, the most frequent one first (if not given: as train.py)
#   SCALE         paper       demo: on digits, in minutes; tableG11 on a folder of images, DATA_DIR
#
# For a budget of your own, with runs and pages in a folder of their own:
#
#   ROOT          out/paper   the runs' folder, without "=" or comma; if given, pages are in it, too
#   STEPS                     training steps
#   EPOCHS                    of table6, tableG7 (default: 100), tableG8, tableG13 (200), tableG11
#   FLAGS                     more flags of what trains (train.py; in tableG13 classify.py, else a
#                             script of latent/): "--ch 64"; none that a target or variable sets
#   CM_FLAGS                  more of them for the runs with --cm: "--w-div 0.2"
#   NUM                       how many images are evaluated, for example 10000
#   FEATURES                  what measures: evaluate.py's --features (default: Inception)
#   EXTRA         50000       how many generated images tableG8 adds to the training set
#   FILL                      tableG8 of a folder: fill each class up to it (default: the largest)
#   CLASSES                   of figures (default: ten) and of tableG7 (those of Few): cat,7,20-25
#   BASE          ddpm        of curves: what CM is added to, a --base of train.py
#   TAIL          rarest      the class of which figures shows many images
#   MODEL                     the Stable Diffusion of tableG11 and ArtBench-10: a folder or hub name
set -euo pipefail
set -f                          # a * or [ in a variable is a character of a name, not a pattern
cd "$(dirname "$0")"
export PYTHONUNBUFFERED=1 RUN_ALL=1      # with the second one no script says what is next
TARGET=${1:-demo}

# stop WORDS: end, since something must be changed first
stop() { echo "error: $1" >&2; exit 2; }

# --------------------------------------------------------------------------------------------------
# Set-up: the packages, in .venv where this Python lacks them

# has PYTHON MODULES: whether this Python is new enough and has these modules
has() {
  command "$1" -c "import sys; from importlib.util import find_spec
sys.exit(sys.version_info < (3, 10) or not all(map(find_spec, sys.argv[1:])))" "${@:2}" 2>/dev/null
}

# set_up FILE MODULES: go on with a Python that has these modules, of the packages that FILE lists
set_up() {
  local file=$1 uv
  shift
  if has python "$@"; then
    return
  elif ! has .venv/bin/python "$@"; then
    uv=$(command -v uv) || has python3 ensurepip \
      || stop "install python3, 3.10 or later, with venv (apt install python3-venv); or uv"
    echo "Python packages are missing: installing those of $file into $PWD/.venv."
    echo "That takes two minutes on a fast line, and 6 GB of disk. To use another environment, stop"
    echo "this (Ctrl-C), activate it, and run: pip install -r $file"
    if [[ $(uname) == Linux ]] && ! command -v nvidia-smi >/dev/null; then
      echo "No GPU found. PyTorch for CPUs only is 4 GB smaller: stop this, run these, start again:"
      echo "  python3 -m venv .venv && .venv/bin/pip install torch torchvision \\"
      echo "    --index-url https://download.pytorch.org/whl/cpu"
    fi
    if [[ -n $uv ]]; then
      [[ -e .venv/bin/python ]] || uv venv --python ">=3.10" .venv
      uv pip install --python .venv/bin/python -r "$file"
    else
      python3 -m venv .venv
      .venv/bin/python -m pip install --disable-pip-version-check -r "$file"
    fi
  fi
  echo "Using the packages in $PWD/.venv"
  export PATH=$PWD/.venv/bin:$PATH
}

if [[ $TARGET == tests ]]; then
  set_up requirements-dev.txt torch sklearn tensorboard pytest xdist ruff diffusers torch_fidelity
  ruff check
  pytest -n 2
  exit
fi
set_up requirements.txt torch torchvision scipy PIL tensorboard tqdm matplotlib sklearn

# --------------------------------------------------------------------------------------------------
# The demo and the smoke run

# stage DONE WORDS: say which part of the demo begins, and, from the per cent of its time that are
# done before it, how long the rest takes: from half on, since a part at the start says too little
stage() {
  local left="about 5 minutes on two cores"
  (( $1 < 50 )) || left="about $(( SECONDS * (100 - $1) / $1 )) s left"
  STAGE=$(( STAGE + 1 ))
  echo "=== $STAGE of 9: $2 ($left) ==="
}

# demo_samples NAME RUN BRANCH OMEGA: sample a run, measure the samples, and add a row to the page
demo_samples() {
  local name=$1 run=$2 branch=$3 omega=$4
  local folder=$OUT/$run/$branch-$omega
  python sample.py --ckpt $OUT/$run/ckpt.pt --branch $branch --guidance $omega \
    --num $NUM $SAMPLER --out $folder --if-needed
  python evaluate.py --samples $folder/samples.npz --features $OUT/classifier/ckpt.pt \
    --floor 10 --if-needed
  ROWS+=(--row "$name=$folder/eval.json")
}

# demo: DDPM, and CM on it, without guidance
demo() {
  STAGE=0 SECONDS=0 ROWS=()
  local train="train.py --dataset digits --ch 16 --lr 4e-3 --lr-decay --ema 0.997 --sample-every 0"
  stage 0 "a classifier, whose features measure the samples"
  python -m recognition.classify --dataset digits --epochs $EPOCHS --out $OUT/classifier

  # Side by side, on one thread each: a step of so small a network gains nothing from a second one
  stage 6 "training DDPM, and beside it CM on DDPM"
  OMP_NUM_THREADS=1 python $train --steps $STEPS --base ddpm --cm --out $OUT/cm \
    > /dev/null 2> >(cat >&2) &
  trap 'kill $(jobs -p) 2>/dev/null || true' EXIT       # where the other one fails, it saves
  OMP_NUM_THREADS=1 python $train --steps $STEPS --base ddpm --no-cm --out $OUT/ddpm
  stage 56 "samples of DDPM; to look at: $OUT/ddpm/full-0/grid.png"
  OMP_NUM_THREADS=1 demo_samples "DDPM" ddpm full 0     # CM has the other core
  stage 62 "the theorems, compared with simulation"
  OMP_NUM_THREADS=1 python theory_sim.py --trials $TRIALS --out $OUT/theory
  stage 66 "training CM to its end (see $OUT/cm/log.jsonl)"
  wait $!
  stage 85 "samples of CM: theta"
  demo_samples "CM" cm full 0
  stage 89 "samples of CM: theta_g alone, without the reserved part, from the same noise"
  demo_samples "CM, theta_g alone" cm general 0

  stage 94 "where the reserved part is used"
  python -m probes.capacity allocation --ckpt $OUT/cm/ckpt.pt --if-needed \
    --quality $OUT/cm/full-0/eval.json $OUT/cm/general-0/eval.json
  stage 97 "the page"
  python -m pages.figures --column DDPM=$OUT/ddpm/full-0 --column CM=$OUT/cm/full-0 \
    --out $OUT/images.png
  python -m pages.report --out $OUT/report.md "${ROWS[@]}" --summary \
    --pair $OUT/cm/general-0/samples.npz $OUT/cm/full-0/samples.npz \
    --picture "Training images, DDPM, CM=$OUT/images.png" \
    --picture "Where the reserved part is used=$OUT/cm/probe/allocation.png" \
    --picture "Theorem 2.1=$OUT/theory/theory.png"
}

# demo_full: on a larger network, with OC and CM on it, with guidance, and the pruning of Fig. 1(b)
demo_full() {
  local omega train="train.py --dataset digits --sample-every 0"
  ROWS=()
  python -m recognition.classify --dataset digits --epochs $EPOCHS --out $OUT/classifier
  python $train --steps $STEPS --base ddpm --no-cm --out $OUT/ddpm
  python $train --steps $STEPS --base oc --no-cm --out $OUT/oc
  python $train --steps $STEPS --base oc --cm --out $OUT/cm
  for omega in 0 1.5; do
    demo_samples "DDPM" ddpm full $omega
    demo_samples "OC" oc full $omega
    demo_samples "CM (on OC)" cm full $omega
    demo_samples "CM, theta_g alone" cm general $omega
  done
  python prune_probe.py --ckpt $OUT/ddpm/ckpt.pt $OUT/cm/ckpt.pt \
    --fractions 0.1,0.2,0.3 --repeats $REPEATS --out $OUT/prune --if-needed
  python -m pages.report --out $OUT/report.md "${ROWS[@]}" \
    --pair $OUT/cm/general-1.5/samples.npz $OUT/cm/full-1.5/samples.npz
}

case $TARGET in
  demo)
    OUT=out/demo EPOCHS=30 STEPS=2500 NUM=2000 SAMPLER="--sampler dpm" TRIALS=4000
    demo
    exit ;;
  demo-full)
    OUT=out/demo-full EPOCHS=30 STEPS=2000 NUM=2000 SAMPLER="--steps 50" REPEATS=10
    demo_full
    exit ;;
  smoke)
    EPOCHS=1 STEPS=8 NUM=100 SAMPLER="--steps 3" REPEATS=1 TRIALS=500
    rm -rf out/smoke
    OUT=out/smoke/demo demo
    OUT=out/smoke/demo-full demo_full
    exit ;;
esac

# --------------------------------------------------------------------------------------------------
# The paper's tables: settings

# Of a target: its data set; all settings that the paper has, SET:IR:RESOLUTION; what trains, train,
# classify or a script of latent/; which of four variables reach that
SET=cifar100 ALL= KIND=train USED="STEPS PRESET"
case $TARGET in
  table1 | table3 | tableG9 | tableG10 | fig4d) ALL="cifar10:100 cifar100:100" ;;
  table2 | fig4b) ALL="cifar10:100 cifar10:50 cifar100:100 cifar100:50" ;;
  table4) SET=celebahq ALL="celebahq:100 celebahq:50" ;;
  table5) SET=imagenet-lt ALL="imagenet-lt::32 imagenet-lt::64 inat2018::32 inat2018::64" ;;
  table6) SET=artbench10 ALL="artbench10:100 artbench10:50" KIND=stable_diffusion ;;
  tableG7) SET=artbench10 KIND=stable_diffusion ;;
  tableG8) USED="STEPS PRESET EPOCHS" ;;
  tableG11) SET=all ALL="cub200 flowers102" KIND=text_to_image USED="STEPS EPOCHS MODEL" ;;
  tableG13) ALL="cifar100:200 cifar100:100" KIND=classify USED="EPOCHS" ;;
  figures)                      # those of ArtBench-10 are of table6's networks
    ALL="celebahq artbench10 cifar100 imagenet-lt inat2018"
    [[ ${DATASET:-} != artbench10 ]] || KIND=stable_diffusion ;;
esac
[[ $KIND != stable_diffusion ]] || USED="EPOCHS MODEL"
SCALE=${SCALE:-paper} DATASET=${DATASET:-$SET} FAILED=0
for NAME in STEPS PRESET EPOCHS MODEL; do
  [[ $DATASET == all || -z ${!NAME:-} || " $USED " == *" $NAME "* ]] \
    || stop "$NAME: $TARGET has no use for it; leave it out"
done
for SIGNAL in 1 2 15; do        # the running command gets it, too, saves its state and ends
  trap "exit $((128 + SIGNAL))" $SIGNAL
done
if [[ $SCALE == paper && $DATASET == all ]]; then
  for ONE in ${ALL:?DATASET=all: the paper has one setting of $TARGET}; do
    IFS=: read -r SET RATIO PIXELS <<< "$ONE"
    env DATASET=$SET ${RATIO:+IR=$RATIO} ${PIXELS:+RESOLUTION=$PIXELS} bash run_all.sh $TARGET \
      || FAILED=1
  done
  exit $FAILED
fi

NGPU=${NGPU:-1} FLAGS=${FLAGS:-} CM_FLAGS=${CM_FLAGS:-} PAGES=${ROOT:-out}
if [[ $SCALE == demo ]]; then
  SEEDS=${SEEDS:-0} NUM=${NUM:-500} EXTRA=${EXTRA:-500} ROOT=${ROOT:-out/paper-demo}
  [[ $KIND == classify ]] || FLAGS="--sample-every 0 $FLAGS"
  if [[ $KIND == stable_diffusion ]]; then
    stop "SCALE=demo: there is no small Stable Diffusion for $TARGET"
  elif [[ $TARGET == tableG11 ]]; then
    : "${DATA_DIR:?SCALE=demo: tableG11 is on a folder of images, one sub-folder per class}"
    DATASET=folder IR=${IR:-10} PRESET=paper RESOLUTION=${RESOLUTION:-32}
    [[ -n ${EPOCHS:-} ]] || STEPS=${STEPS:-800}
  else
    DATASET=digits IR=${IR:-20} PRESET=digits STEPS=${STEPS:-300} EPOCHS=${EPOCHS:-60}
    FEATURES=$ROOT/classifier/ckpt.pt
    python -m recognition.classify --dataset digits --epochs 10 --out "$ROOT/classifier"
  fi
fi
case $DATASET in                # as train.py's defaults
  imagenet-lt | inat2018) IR=1 RESOLUTION=${RESOLUTION:-64} ;;    # long-tailed as they are
  folder) IR=${IR:-1} ;;
  cub200 | flowers102) IR=${IR:-10} ;;
  *) IR=${IR:-100} ;;
esac
PRESET=${PRESET:-paper} SEEDS=${SEEDS:-0,1,2} ROOT=${ROOT:-out/paper} DATA_DIR=${DATA_DIR:-data}
if [[ $SCALE == paper && -n ${FEATURES:-} ]]; then     # before hours of training
  python -m metrics.features --features "$FEATURES"
fi
if [[ $TARGET:$DATASET == tableG8:folder && ! -d $DATA_DIR/train ]]; then
  python data.py split --data-dir "$DATA_DIR"   # a classifier needs images to be tested on
  DATA_DIR=${DATA_DIR%/}-split
fi

# SETTING: the data set and its ratio, in names of folders and for report.py
SETTING=$DATASET-ir$IR${RESOLUTION:+-$RESOLUTION}
case $DATASET in imagenet-lt | inat2018) SETTING=$DATASET-$RESOLUTION ;; esac
case $PRESET in                 # as train.py's presets
  small) STEPS=${STEPS:-20000} SETTING+=-small ;;
  tiny) STEPS=${STEPS:-4000} SETTING+=-tiny ;;
esac
RUNS=$ROOT/$SETTING/             # and then the run's name
case $KIND in stable_diffusion | text_to_image) RUNS+=$KIND- ;; esac
OUT=$PAGES/$TARGET/$SETTING

# Some targets look at one network of each kind
FIRST_SEED=${SEEDS%%,*}
case $TARGET in
  fig1b | dominance | allocation | pictures | figures | tableG7) SEEDS=$FIRST_SEED ;;
esac

# --------------------------------------------------------------------------------------------------
# The paper's tables: how runs become rows, and rows become a page

# Flags: of what trains, of evaluate.py, of a page, of a picture. Runs whose training failed
COMMON=(--dataset "$DATASET" --ir "$IR" --data-dir "$DATA_DIR"
  ${RESOLUTION:+--resolution "$RESOLUTION"} ${CLASS_ORDER:+--class-order "$CLASS_ORDER"})
EVAL_FLAGS= ROWS=() SHOWN=() BROKEN=

# failed WHAT: note it, and go on with the rest
failed() { echo "error: $1 failed; going on with the rest" >&2; FAILED=1; }

# first RUN: the folder of its first seed
first() { echo "$RUNS$1-seed$FIRST_SEED"; }

# launch SCRIPT [flags], launch -m MODULE [flags]: start a script on one GPU, or on several; not
# where a flag names a file of a broken run
launch() {
  local run
  for run in $BROKEN; do
    [[ "$*" != *"$RUNS$run/"* ]] || return 1
  done
  case $NGPU:$1 in              # without "--" torchrun would read a script's --num as its own
    1:*) python "$@" ;;
    *:-m) torchrun --nproc_per_node=$NGPU -m -- "${@:2}" ;;
    *) torchrun --nproc_per_node=$NGPU -- "$@" ;;
  esac
}

# on_one_gpu WHAT SCRIPT [flags]: look at runs or their samples
on_one_gpu() { NGPU=1 launch "${@:2}" || failed "$1"; }

# train RUN SEED [flags]: train a run with a seed; @SEED in a flag stands for the seed
train() {
  local run=$1 seed=$2 how cm_flags=
  shift 2
  case $KIND in
    train) how=(train.py --preset "$PRESET" ${STEPS:+--steps "$STEPS"}) ;;
    classify) how=(-m recognition.classify --preset "$PRESET" ${EPOCHS:+--epochs "$EPOCHS"}) ;;
    stable_diffusion)
      how=(-m latent.$KIND train ${MODEL:+--model "$MODEL"} ${EPOCHS:+--epochs "$EPOCHS"}) ;;
    text_to_image)
      how=(-m latent.$KIND train ${MODEL:+--autoencoder "$MODEL" --text-encoder "$MODEL"}
        ${STEPS:+--steps "$STEPS"} ${EPOCHS:+--epochs "$EPOCHS"}) ;;
  esac
  [[ " $* " != *" --cm "* ]] || cm_flags=$CM_FLAGS
  launch "${how[@]}" "${COMMON[@]}" $FLAGS "${@//@SEED/$seed}" $cm_flags --seed $seed \
    --out "$RUNS$run-seed$seed" || { BROKEN+=" $run-seed$seed"; return 1; }
}

# sample RUN SEED FOLDER [flags]: samples of a run, in a folder of its own
sample() {
  local script=sample.py run=$RUNS$1-seed$2
  [[ $KIND == train ]] || script="-m latent.$KIND sample"
  launch $script --ckpt "$run/ckpt.pt" "${@:4}" --out "$run/$3" --if-needed
}

# measure RUN SEED FILE [CHECKPOINT]: the metrics of a run, by EVAL_FLAGS, in a file of its folder
measure() {
  local run=$RUNS$1-seed$2 of
  if [[ $KIND == classify || " fig1b dominance pictures figures " == *" $TARGET "* ]]; then
    return 0                    # classify.py has measured; the others need no numbers
  elif [[ $KIND == train ]]; then
    of=(--ckpt "$run/${4:-ckpt.pt}" --seed $2)
  else
    sample $1 $2 samples --num "${NUM:-50000}" --seed $2 || return
    of=(--samples "$run/samples/samples.npz" --data-dir "$DATA_DIR")
  fi
  launch evaluate.py "${of[@]}" ${NUM:+--num "$NUM"} ${FEATURES:+--features "$FEATURES"} \
    $EVAL_FLAGS --out-json "$run/$3" --if-needed
}

# row NAME RUN [flags of the training]: train and evaluate a run with each seed, which is also that
# of the noise that is sampled, and add a row to the page
row() {
  local name=$1 run=$2 json seed files=
  shift 2
  # One file per way of evaluating: eval-plain.json, eval-__guidance_0.json, ...
  json=eval-$(echo "${EVAL_FLAGS:-plain}" | tr -c 'a-z0-9.\n' _).json
  [[ $KIND != classify ]] || json=result.json
  for seed in ${SEEDS//,/ }; do
    if train $run $seed "$@" && measure $run $seed $json; then
      files+=$RUNS$run-seed$seed/$json,
    else
      failed "$name, seed $seed"
      files+=$RUNS$run-seed$seed/failed,        # report.py marks what has no file
    fi
  done
  ROWS+=(--row "$name=$files")
}

# The rows that most tables have
ddpm() { row DDPM ddpm --base ddpm --no-cm; }
cbdm() { row CBDM cbdm --base cbdm --no-cm; }
oc() { row OC oc --base oc --no-cm; }
cm() { row CM cm --base oc --cm; }
four() { ddpm; cbdm; oc; cm; }
theta_g() { EVAL_FLAGS="--branch general" row "CM (theta_g)" cm --base oc --cm; }

# with_and_without NAME RUN [flags of the training]: a row without CM, and one with it
with_and_without() {
  row "$1" $2 --no-cm "${@:3}"
  row "CM on $1" cm-$2 --cm "${@:3}"
}

# classes NAME RUN [flags of classify.py]: a row of classifiers, on one GPU
classes() { KIND=classify NGPU=1 row "$1" classify-$2 "${@:3}"; }

# classes_with NAME RUN [flags of train.py]: train a run with each seed, and a row of classifiers
# with its images: EXTRA in all; of a folder what each class lacks to have FILL
classes_with() {
  local seed how=(--num "${EXTRA:-50000}")
  [[ $DATASET != folder ]] || how=(--fill-to ${FILL:-})
  for seed in ${SEEDS//,/ }; do
    train $2 $seed "${@:3}" && sample $2 $seed extra "${how[@]}" --seed $seed \
      || failed "$2, seed $seed"
  done
  FLAGS= classes "$1" $2 --extra "$RUNS$2-seed@SEED/extra/samples.npz"
}

# show NAME RUN FOLDER [flags of sample.py]: sample the first seed of a run: a column of a picture
show() {
  sample $2 $FIRST_SEED "${@:3}" && SHOWN+=(--column "$1=$(first $2)/$3/samples.npz") \
    || failed "the column $1"
}

# figure FILE [flags of figures.py]: the picture of the columns so far
figure() {
  python -m pages.figures ${SHOWN[@]+"${SHOWN[@]}"} --data-dir "$DATA_DIR" "${@:2}" --out "$1" \
    || failed "$1"
  SHOWN=()
}

# along NAME RUN TENTHS [flags of train.py]: train a run with each seed, for TENTHS tenths of the
# steps; measure it four times on the way, and add a curve to the page
along() {
  local steps=$(( $3 * ${STEPS:-300000} / 10 )) seed quarter omega
  for seed in ${SEEDS//,/ }; do
    STEPS=$steps train $2 $seed --keep-every $(( steps / 4 )) "${@:4}" \
      || { failed "$1, seed $seed"; continue; }
    for quarter in 1 2 3 4; do
      for omega in 0 1.5; do
        EVAL_FLAGS="--sampler dpm --guidance $omega" measure $2 $seed curve-$quarter-$omega.json \
          ckpt-$(printf %07d $(( quarter * (steps / 4) ))).pt \
          || failed "$1, seed $seed, a point of its curve"
      done
    done
  done
  ROWS+=(--curve "$1=$RUNS$2-seed*/curve-*.json")
}

# page TABLE [FILE [flags of report.py]]: the rows so far, beside a table of paper_results.json
page() {
  local file=$OUT/${2:-report}.md
  [[ $DATASET == folder ]] || ROWS+=(--paper $1 --setting "$SETTING")   # else all that was measured
  python -m pages.report "${ROWS[@]}" "${@:3}" --out "$file" || failed "a row of $file"
  ROWS=()
}

# --------------------------------------------------------------------------------------------------
# The paper's tables: one block per target

case $TARGET in
  table1)                       # Low-rank variants of CBDM
    ddpm; cbdm
    row "CBDM (theta_g + theta_e)" cbdm-low-rank --base cbdm --cm --lam 0
    row "CBDM (LoRA)" cbdm-lora --base cbdm --lora --init-from "${RUNS}cbdm-seed@SEED/ckpt.pt"
    cm
    page table1 ;;
  table2)                       # Tables 2 and G.1: all baselines
    ddpm
    row +ADA ada --base ddpm --no-cm --ada 0.12
    row +RS rs --base ddpm --no-cm --resample 0.5
    row +Focal focal --base focal --no-cm
    cbdm; oc; cm
    page table2 ;;
  table3 | table5 | table6)     # Tables 3, G.4, Figure 2(c): Many, Medium and Few; 5: many classes;
    four                        # 6, G.3: Stable Diffusion, after pip install diffusers transformers
    page $TARGET ;;
  table4)                       # Tables 4 and G.2: CelebA-HQ, per class
    EVAL_FLAGS=--per-class four
    page table4 ;;
  table7)                       # Tables 7, G.5, G.6: theta_g alone; without one of CM's two terms
    ddpm; theta_g; cm
    page table7-left theta_g
    ddpm; oc; cm
    row "CM w/o L_Con" cm-no-con --base oc --cm --w-con 0
    row "CM w/o L_Div" cm-no-div --base oc --cm --w-div 0
    page table7-right ;;
  tableE2)                      # One low-rank expert per group
    ddpm
    row "Group-Expert LoRA" experts --base ddpm --no-cm --experts group
    cm
    page tableE2 ;;
  tableG7)                      # The human study, of table6's samples: study.html, and its key
    ddpm; cm
    on_one_gpu "the study" -m pages.study make --a "DDPM=$(first ddpm)/samples" \
      --b "CM=$(first cm)/samples" --real "$DATASET" --data-dir "$DATA_DIR" \
      ${CLASSES:+--classes "$CLASSES"} --out "$OUT" ;;
  tableG8)                      # Classification with generated images; FLAGS are of train.py alone
    FLAGS= classes "No augmentation" plain
    classes_with DDPM ddpm --base ddpm --no-cm
    if [[ $DATASET == folder ]]; then
      classes_with "CM on DDPM" cm-ddpm --base ddpm --cm
    else
      classes_with CM cm --base oc --cm
    fi
    page tableG8 report --summary ;;
  tableG9)                      # Consistency models
    with_and_without "Consistency model" consistency --base consistency
    page tableG9 ;;
  tableG10)                     # DPM-Solver with 15 steps
    EVAL_FLAGS="--sampler dpm"
    ddpm; cm
    page tableG10 ;;
  tableG11)                     # Text to image from scratch, as table6 with diffusers installed
    if [[ $SCALE == demo ]]; then
      # A classifier to measure with, and the autoencoder, on the images of DATA_DIR
      DIR=$ROOT/$SETTING FEATURES=$ROOT/$SETTING/classifier/ckpt.pt
      python -m recognition.classify --preset paper --dataset folder --ir 1 --data-dir "$DATA_DIR" \
        --resolution "$RESOLUTION" --width 16 --epochs 30 --out "$DIR/classifier"
      python -m latent.text_to_image autoencoder "${COMMON[@]}" --factor 4 --ch 16 --steps 400 \
        --lr 2e-3 --warmup 50 --ema 0.99 --batch-size 32 --sample-every 400 --out "$DIR/autoencoder"
      COMMON+=(--autoencoder "$DIR/autoencoder/ckpt.pt" --text-encoder words
        --ch 64 --depth 6 --lr 1e-3 --warmup 50 --ema 0.99 --batch-size 32)
    fi
    row "Latent diffusion" ddpm --base ddpm --no-cm
    row CM cm-ddpm --base ddpm --cm
    page tableG11 ;;
  tableG12)                     # Overlap optimisation
    ddpm
    row "Overlap Opt." rop --base rop --no-cm
    cm
    page tableG12 ;;
  tableG13)                     # Long-tailed recognition (also with IR=200)
    for LOSS in CE:ce LDAM:ldam LA:la; do
      classes ${LOSS%:*} ${LOSS#*:} --loss ${LOSS#*:}
      classes "${LOSS%:*} + CM" ${LOSS#*:}-cm --loss ${LOSS#*:} --cm
    done
    page tableG13 ;;
  fig1b)                        # Figures 1(b), G.1 and G.2: what pruning does to each class
    ddpm; cm                    # the paper's are of DDPM alone
    on_one_gpu "the probe" prune_probe.py --ckpt "$(first ddpm)/ckpt.pt" "$(first cm)/ckpt.pt" \
      --fractions 0.05,0.1,0.2,0.3 --out "$OUT" --if-needed ;;
  fig4a)                        # CM on each baseline
    with_and_without DDPM ddpm --base ddpm
    with_and_without +ADA ada --base ddpm --ada 0.12
    with_and_without +RS rs --base ddpm --resample 0.5
    with_and_without +Focal focal --base focal
    with_and_without CBDM cbdm --base cbdm
    oc; cm
    page fig4a ;;
  fig4b)                        # Figures 4(b) and G.3: lambda, which is 1 in CM
    oc
    for LAM in 0 0.5 0.8 1.2 1.5; do
      row "lambda $LAM" cm-lam$LAM --base oc --cm --lam $LAM
    done
    cm
    page fig4b ;;
  fig4c)                        # The rank ratio, which is 0.1 in CM
    oc
    for RATIO in 0.05 0.2 0.3 0.5; do
      row "rank $RATIO" cm-rank$RATIO --base oc --cm --rank-ratio $RATIO
    done
    cm
    page fig4c ;;
  fig4d)                        # The network's width
    for MULT in "1 2 2" "1 2 2 2" "1 2 3 4"; do
      SUFFIX=-mult${MULT// /}   # but none where it is the preset's own: the runs of table2
      case $PRESET:$MULT in "paper:1 2 2 2" | "small:1 2 2 2" | "tiny:1 2 2") SUFFIX= ;; esac
      row "OC, $MULT" oc$SUFFIX --base oc --no-cm --ch-mult $MULT
      row "CM, $MULT" cm$SUFFIX --base oc --cm --ch-mult $MULT
    done
    page fig4d ;;
  theory)                       # Theorems 2.1, 3.1, F.1 and F.2, compared with simulation
    python theory_sim.py --out "$PAGES/theory" ;;
  allocation)                   # What the reserved part is and does
    theta_g; cm
    on_one_gpu "the probe" -m probes.capacity allocation --ckpt "$(first cm)/ckpt.pt" --if-needed \
      --quality "$(first cm)/eval-plain.json" "$(first cm)/eval-__branch_general.json" ;;
  dominance)                    # Theorem 2.1 on the gradients of a trained network
    ddpm; cm
    for RUN in ddpm cm; do
      on_one_gpu "the probe of $RUN" -m probes.capacity dominance --ckpt "$(first $RUN)/ckpt.pt" \
        --if-needed
    done ;;
  gain)     # Not in the paper: what CM adds to DDPM and to OC, without and with guidance
    # A step of CM takes as long as 1.7 steps without (bench.py)
    LONG=$((17 * ${STEPS:-300000} / 10))
    for OMEGA in 0 1.5; do
      EVAL_FLAGS="--guidance $OMEGA"
      with_and_without DDPM ddpm --base ddpm
      row "DDPM, as long" ddpm-long --base ddpm --no-cm --steps $LONG
      if [[ $DATASET != folder ]]; then
        oc; cm
        row "OC, as long" oc-long --base oc --no-cm --steps $LONG
      else      # its samples beside training images, and whether they are copies
        show DDPM ddpm samples-$OMEGA --num "${NUM:-2000}" --guidance $OMEGA
        show "CM on DDPM" cm-ddpm samples-$OMEGA --num "${NUM:-2000}" --guidance $OMEGA
        figure "$OUT/samples-$OMEGA.png"
        on_one_gpu "the probe" -m probes.copies --ckpt "$(first cm-ddpm)/ckpt.pt" \
          --samples "$(first cm-ddpm)/samples-$OMEGA/samples.npz" \
          "$(first ddpm)/samples-$OMEGA/samples.npz" --data-dir "$DATA_DIR" \
          ${FEATURES:+--features "$FEATURES"} --out "$OUT/copies-$OMEGA"
        ROWS+=(--copies "$OUT/copies-$OMEGA/copies.json"
          --picture "Training images, DDPM, CM on DDPM=$OUT/samples-$OMEGA.png"
          --picture "CM on DDPM, and the nearest training images=$OUT/copies-$OMEGA/pairs.png")
      fi
      page table3 guidance-$OMEGA --summary
    done ;;
  curves)   # Not in the paper: CM beside its base, along as many seconds of training
    BASE=${BASE:-ddpm}
    NAME=$(tr a-z A-Z <<< "$BASE")
    along $NAME $BASE-long 17 --base $BASE --no-cm
    along "CM on $NAME" cm-$BASE 10 --base $BASE --cm
    python -m pages.curves "${ROWS[@]}" --cost 1.7 --out "$OUT/$BASE.md" || failed "the page" ;;
  pictures)                     # Training images, and beside them samples of DDPM and of CM on it
    with_and_without DDPM ddpm --base ddpm
    show DDPM ddpm samples --num "${NUM:-400}"
    show "CM on DDPM" cm-ddpm samples --num "${NUM:-400}"
    figure "$OUT.png" ;;
  figures)  # Figures 1(a), 3, G.4 to G.12: classes in rows, methods in columns, from the same noise
    four
    ROWS_OF=(--num "${NUM:-400}" ${CLASSES:+--classes "$CLASSES"})
    for METHOD in DDPM:ddpm CBDM:cbdm OC:oc CM:cm; do
      show ${METHOD%:*} ${METHOD#*:} figures/classes "${ROWS_OF[@]}"
    done
    figure "$OUT/methods.png" ${CLASSES:+--classes "$CLASSES"}
    # What theta_g lacks (Fig. G.4)
    show "theta_g alone" cm figures/classes-general --branch general "${ROWS_OF[@]}"
    show "theta = theta_g + BA" cm figures/classes "${ROWS_OF[@]}"
    figure "$OUT/theta_g.png" ${CLASSES:+--classes "$CLASSES"}
    # How different the images of one rare class are (Fig. 3, G.5 to G.7)
    TAIL=${TAIL:-rarest}
    show DDPM ddpm "figures/tail-$TAIL" --classes "$TAIL" --num 25
    show CM cm "figures/tail-$TAIL" --classes "$TAIL" --num 25
    figure "$OUT/tail-$TAIL.png" --across 5 --down 5 ;;
  *) stop "unknown target '$TARGET'; see the head of run_all.sh" ;;
esac
exit $FAILED
