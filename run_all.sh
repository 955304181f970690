#!/usr/bin/env bash
# Every experiment as plain commands. What is finished is skipped and what was stopped is resumed,
# so it is safe to start this script again.
#
#   bash run_all.sh          the demo: DDPM, OC and CM on long-tailed digits;
#                            about 20 minutes on two CPU cores
#   bash run_all.sh smoke    the commands of the demo with a few steps of everything: a minute
#   bash run_all.sh tests    the lint and the tests
#   bash run_all.sh table2   one of the paper's tables; out/table2/SETTING/report.md shows its
#                            numbers with the paper's beside them
#
# It needs Python 3.10 or later. Where the packages are missing, it installs them into .venv first.
#
# Targets:
#   tables     table1 table2 table3 table4 table5 table6 table7
#              tableE2 tableG8 tableG9 tableG10 tableG11 tableG12 tableG13
#   figures    fig1b fig4a fig4b fig4c fig4d figures (1(a), 3, G.4 to G.12: samples)
#   others     theory allocation dominance gain pictures
# They share their runs, which are in out/paper.
#
# Environment variables of these targets (the demo and the smoke run take none of them):
#
#   variable      default     meaning
#   DATASET       cifar100    the data set (in table4 celebahq, in table5 imagenet-lt, in table6
#                             artbench10, in tableG11 cub200 and then flowers102)
#   IR            100         the imbalance ratio (cub200, flowers102: 10; folder: 1)
#   SEEDS         0,1,2       one run per seed
#   NGPU          1           how many GPUs; more than one: torchrun
#   DATA_DIR      data        where the data set is
#   PRESET        paper       small or tiny: smaller networks, fewer steps (see train.py)
#   RESOLUTION                the images' size in pixels (if not given: the set's own)
#   CLASS_ORDER               all classes, the most frequent one first (if not given: as train.py)
#   SCALE         paper       demo: everything on digits, in minutes, with defaults of its own;
#                             tableG11 on a folder of images, DATA_DIR, one sub-folder per class
#
# For a budget of your own, with runs and pages in a folder of their own:
#
#   ROOT          out/paper   the runs' folder, without "=" or comma; if given, pages are in it, too
#   STEPS                     training steps
#   FLAGS                     more flags of train.py (in tableG11 of text_to_image.py train), for
#                             example "--ch 64 --lr 5e-4"; none that the target or a variable sets
#   CM_FLAGS                  more flags of train.py for the runs with --cm: "--w-div 0.2"
#   NUM                       how many images are evaluated, for example 10000
#   FEATURES                  a checkpoint of classify.py to measure with (default: Inception)
#   EPOCHS                    epochs in tableG8 and tableG13 (default: 200) and table6 (100)
#   EXTRA         50000       how many generated images tableG8 adds to the training set
#   CLASSES                   the rows of figures: cat,7,20-25 (if not given: ten, evenly spread)
#   TAIL          rarest      the class of which figures shows many images
#   MODEL                     Stable Diffusion for table6 and, its autoencoder and text encoder,
#                             for tableG11: a folder or a name on the hub
set -euo pipefail
set -f                          # a * or [ in a variable is a character of a name, not a pattern
cd "$(dirname "$0")"
export PYTHONUNBUFFERED=1
TARGET=${1:-demo}

# --------------------------------------------------------------------------------------------------
# Set-up: the packages, in .venv where this Python lacks them

# has PYTHON MODULES: whether this Python is new enough and has these modules
has() {
  command "$1" -c "import sys; from importlib.util import find_spec
sys.exit(sys.version_info < (3, 10) or not all(map(find_spec, sys.argv[1:])))" "${@:2}" 2>/dev/null
}

# set_up FILE MODULES: go on with a Python that has these modules, of the packages that FILE lists
set_up() {
  local file=$1
  shift
  if has python "$@"; then
    return
  fi
  if ! has .venv/bin/python "$@"; then
    if ! command -v uv >/dev/null && ! has python3; then
      echo "error: Python 3.10 or later is needed, as python3; or install uv" >&2
      exit 2
    elif ! command -v uv >/dev/null && ! has python3 ensurepip; then
      echo "error: python3 cannot make .venv; run: apt install python3-venv (or install uv)" >&2
      exit 2
    fi
    echo "Python packages are missing: installing those of $file into $PWD/.venv."
    echo "That takes two minutes on a fast line, and 6 GB of disk. To use another environment, stop"
    echo "this (Ctrl-C), activate it, and run: pip install -r $file"
    if [[ $(uname) == Linux ]] && ! command -v nvidia-smi >/dev/null; then
      echo "No GPU was found (nvidia-smi). PyTorch for CPUs only is about 4 GB smaller; to have it,"
      echo "stop this, run the following, and start again:"
      echo "  python3 -m venv .venv && .venv/bin/pip install torch torchvision \\"
      echo "    --index-url https://download.pytorch.org/whl/cpu"
    fi
    if command -v uv >/dev/null; then
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

# demo_train RUN [flags]: train a run
demo_train() {
  local run=$1
  shift
  python train.py --dataset digits --steps $STEPS "$@" --sample-every $GRIDS --out $OUT/$run
}

# demo_samples NAME RUN BRANCH OMEGA: sample a run, measure the samples, and add a row to the page
demo_samples() {
  local name=$1 run=$2 branch=$3 omega=$4
  local folder=$OUT/$run/$branch-$omega
  python sample.py --ckpt $OUT/$run/ckpt.pt --branch $branch --guidance $omega \
    --num $NUM --steps $DDIM --out $folder --if-needed
  python evaluate.py --samples $folder/samples.npz --features $OUT/classifier/ckpt.pt \
    --floor 10 --if-needed
  ROWS+=(--row "$name=$folder/eval.json")
}

demo() {
  # The feature classifier, on the balanced training set
  python -m recognition.classify --dataset digits --epochs $EPOCHS --out $OUT/classifier

  # DDPM, OC, and CM on OC (the paper's default); a run whose step equals its steps is finished
  demo_train ddpm --base ddpm --no-cm
  demo_train oc --base oc --no-cm
  demo_train cm --base oc --cm

  # Samples of each, and of theta_g alone from the same noise, without and with guidance
  local omega
  ROWS=()
  for omega in 0 1.5; do
    demo_samples "DDPM" ddpm full $omega
    demo_samples "OC" oc full $omega
    demo_samples "CM (on OC)" cm full $omega
    demo_samples "CM, theta_g alone" cm general $omega
  done
  python -m pages.report --out $OUT/report.md "${ROWS[@]}" \
    --pair $OUT/cm/general-1.5/samples.npz $OUT/cm/full-1.5/samples.npz

  # The pruning probe of Fig. 1(b)
  python prune_probe.py --ckpt $OUT/ddpm/ckpt.pt $OUT/cm/ckpt.pt \
    --fractions 0.1,0.2,0.3 --repeats $REPEATS --out $OUT/prune

  # Where CM's reserved part is used
  python -m probes.capacity allocation --ckpt $OUT/cm/ckpt.pt \
    --quality $OUT/cm/full-1.5/eval.json $OUT/cm/general-1.5/eval.json

  # The theorems, compared with simulation
  python theory_sim.py --trials $TRIALS --out $OUT/theory
}

case $TARGET in
  demo)
    OUT=out/demo EPOCHS=30 STEPS=2000 GRIDS=500 NUM=2000 DDIM=50 REPEATS=10 TRIALS=20000
    demo
    exit ;;
  smoke)
    OUT=out/smoke EPOCHS=1 STEPS=8 GRIDS=0 NUM=100 DDIM=3 REPEATS=1 TRIALS=500
    rm -rf $OUT
    demo
    exit ;;
esac

# The end of the demo and the smoke run
# --------------------------------------------------------------------------------------------------
# The paper's tables: settings

SCALE=${SCALE:-paper}
if [[ $TARGET == tableG11 && $SCALE == paper && -z ${DATASET:-} ]]; then
  DATASET=cub200 bash run_all.sh tableG11
  DATASET=flowers102 bash run_all.sh tableG11
  exit
fi
NGPU=${NGPU:-1}
FLAGS=${FLAGS:-}
CM_FLAGS=${CM_FLAGS:-}
PAGES=${ROOT:-out}
PARTS=()                        # the autoencoder and the text encoder of tableG11

if [[ $SCALE == demo ]]; then
  if [[ $TARGET == tableG11 ]]; then
    : "${DATA_DIR:?SCALE=demo: tableG11 is on a folder of images, one sub-folder per class}"
    DATASET=folder IR=${IR:-10} PRESET=paper RESOLUTION=${RESOLUTION:-32} STEPS=${STEPS:-800}
  else
    DATASET=digits IR=${IR:-20} PRESET=digits STEPS=${STEPS:-300}
  fi
  SEEDS=${SEEDS:-0} NUM=${NUM:-500} EPOCHS=${EPOCHS:-60} EXTRA=${EXTRA:-500}
  ROOT=${ROOT:-out/paper-demo} FLAGS="--sample-every 0 $FLAGS"
  if [[ $DATASET == digits ]]; then
    FEATURES=$ROOT/classifier/ckpt.pt
    python -m recognition.classify --dataset digits --epochs 10 --out "$ROOT/classifier"
  fi
else
  case $TARGET in
    table4) DATASET=${DATASET:-celebahq} ;;
    table5) DATASET=${DATASET:-imagenet-lt} ;;
    table6) DATASET=${DATASET:-artbench10} ;;
    *) DATASET=${DATASET:-cifar100} ;;
  esac
  case $DATASET in              # as train.py's defaults
    imagenet-lt | inat2018) IR=1 RESOLUTION=${RESOLUTION:-64} ;;    # long-tailed as they are
    folder) IR=${IR:-1} ;;
    cub200 | flowers102) IR=${IR:-10} ;;
    *) IR=${IR:-100} ;;
  esac
  PRESET=${PRESET:-paper} SEEDS=${SEEDS:-0,1,2} ROOT=${ROOT:-out/paper}
fi
DATA_DIR=${DATA_DIR:-data}

# SETTING: the data set and its ratio, in names of folders and for report.py
SETTING=$DATASET-ir$IR${RESOLUTION:+-$RESOLUTION}
case $DATASET in
  imagenet-lt | inat2018) SETTING=$DATASET-$RESOLUTION ;;
esac
case $PRESET in                 # as train.py's presets
  small) STEPS=${STEPS:-20000} SETTING+=-small ;;
  tiny) STEPS=${STEPS:-4000} SETTING+=-tiny ;;
esac
RUNS=$ROOT/$SETTING

# Some targets look at one network of each kind
FIRST_SEED=${SEEDS%%,*}
case $TARGET in
  fig1b | dominance | allocation | pictures | figures) SEEDS=$FIRST_SEED ;;
esac

DATA=(--dataset "$DATASET" --ir "$IR" --data-dir "$DATA_DIR"
  ${RESOLUTION:+--resolution "$RESOLUTION"} ${CLASS_ORDER:+--class-order "$CLASS_ORDER"})

# --------------------------------------------------------------------------------------------------
# The paper's tables: how runs become rows, and rows become a page

ROWS=()                         # of a page: report.py's flags
SHOWN=()                        # of a picture: figures.py's flags

# launch SCRIPT [flags], launch -m MODULE [flags]: start a script on one GPU, or on several
launch() {
  if (( NGPU == 1 )); then
    python "$@"
  elif [[ $1 == -m ]]; then     # "--" since torchrun would read a script's --num as its own
    torchrun --nproc_per_node=$NGPU -m -- "${@:2}"
  else
    torchrun --nproc_per_node=$NGPU -- "$@"
  fi
}

# train RUN SEED [flags of train.py]: train a run with a seed; @SEED in a flag stands for the seed
train() {
  local run=$1 seed=$2 cm_flags=
  shift 2
  if [[ " $* " == *" --cm "* ]]; then
    cm_flags=$CM_FLAGS
  fi
  launch train.py "${DATA[@]}" --preset "$PRESET" ${STEPS:+--steps "$STEPS"} $FLAGS \
    "${@//@SEED/$seed}" $cm_flags --seed $seed --out "$RUNS/$run-seed$seed"
}

# add_row NAME START END: add a row to the page, of the JSON files START<seed>END of all seeds
add_row() {
  local files= seed
  for seed in ${SEEDS//,/ }; do
    files+="$2$seed$3,"
  done
  ROWS+=(--row "$1=$files")
}

# row NAME RUN [flags of train.py] [-- flags of evaluate.py]:
# train and evaluate a run with each seed, which is also that of the noise that is sampled,
# and add a row to the page
row() {
  local name=$1 run=$2 train_flags=() evaluate_flags json seed folder
  shift 2
  while (( $# )) && [[ $1 != -- ]]; do
    train_flags+=("$1")
    shift
  done
  evaluate_flags=("${@:2}")

  # One file per way of evaluating: eval-plain.json, eval-__guidance_0.json, ...
  json=eval-$(echo "${evaluate_flags[*]:-plain}" | tr -c 'a-z0-9.\n' _).json
  for seed in ${SEEDS//,/ }; do
    train $run $seed "${train_flags[@]}"
    if [[ $TARGET == fig1b || $TARGET == dominance ]]; then
      continue                # these need no samples
    fi
    folder=$RUNS/$run-seed$seed
    launch evaluate.py --ckpt "$folder/ckpt.pt" \
      --seed $seed ${NUM:+--num "$NUM"} ${FEATURES:+--features "$FEATURES"} \
      ${evaluate_flags[@]+"${evaluate_flags[@]}"} --out-json "$folder/$json" --if-needed
  done
  add_row "$name" "$RUNS/$run-seed" "/$json"
}

# The rows that most tables have; flags of train.py or, after --, of evaluate.py may be given
ddpm() { row DDPM ddpm --base ddpm --no-cm "$@"; }
cbdm() { row CBDM cbdm --base cbdm --no-cm "$@"; }
oc() { row OC oc --base oc --no-cm "$@"; }
cm() { row CM cm --base oc --cm "$@"; }
four() { ddpm "$@"; cbdm "$@"; oc "$@"; cm "$@"; }

# with_and_without NAME RUN [flags of train.py]: a row without CM, and one with it
with_and_without() {
  row "$1" $2 --no-cm "${@:3}"
  row "CM on $1" cm-$2 --cm "${@:3}"
}

# classes NAME RUN [flags of classify.py]: train a classifier with each seed, and add a row
classes() {
  local name=$1 run=$2 seed
  shift 2
  for seed in ${SEEDS//,/ }; do
    python -m recognition.classify "${DATA[@]}" ${EPOCHS:+--epochs "$EPOCHS"} "${@//@SEED/$seed}" \
      --seed $seed --out "$RUNS/classify-$run-seed$seed"
  done
  add_row "$name" "$RUNS/classify-$run-seed" /result.json
}

# extra_images RUN [flags of train.py]: train a run with each seed; images for a classifier from it
extra_images() {
  local seed folder
  for seed in ${SEEDS//,/ }; do
    folder=$RUNS/$1-seed$seed
    train $1 $seed "${@:2}"
    launch sample.py --ckpt "$folder/ckpt.pt" --num "${EXTRA:-50000}" --seed $seed \
      --out "$folder/extra" --if-needed
  done
}

# latent MODULE NAME RUN [flags of its train]: train stable_diffusion.py or text_to_image.py with
# each seed, sample, evaluate, and add a row
latent() {
  local module=latent.$1 name=$2 run=$1-$3 seed folder
  shift 3
  for seed in ${SEEDS//,/ }; do
    folder=$RUNS/$run-seed$seed
    launch -m $module train "${DATA[@]}" "$@" --seed $seed --out "$folder"
    launch -m $module sample --ckpt "$folder/ckpt.pt" --num "${NUM:-50000}" --seed $seed \
      --out "$folder/samples" --if-needed
    launch evaluate.py --samples "$folder/samples/samples.npz" --data-dir "$DATA_DIR" \
      ${NUM:+--num "$NUM"} ${FEATURES:+--features "$FEATURES"} --if-needed
  done
  add_row "$name" "$RUNS/$run-seed" /samples/eval.json
}

sd() {
  latent stable_diffusion "$@" ${MODEL:+--model "$MODEL"} ${EPOCHS:+--epochs "$EPOCHS"}
}

text() {
  latent text_to_image "$@" ${PARTS[@]+"${PARTS[@]}"} ${STEPS:+--steps "$STEPS"} $FLAGS
}

# small_parts: the demo's autoencoder, and a classifier to measure with, on the images of DATA_DIR
small_parts() {
  FEATURES=$RUNS/classifier/ckpt.pt
  python -m recognition.classify --dataset folder --ir 1 --data-dir "$DATA_DIR" \
    --resolution "$RESOLUTION" --width 16 --epochs 30 --out "$RUNS/classifier"
  python -m latent.text_to_image autoencoder "${DATA[@]}" --factor 4 --ch 16 --lr 2e-3 --warmup 50 \
    --ema 0.99 --batch-size 32 --steps 400 --sample-every 400 --out "$RUNS/autoencoder"
  PARTS=(--autoencoder "$RUNS/autoencoder/ckpt.pt" --text-encoder words
    --ch 64 --depth 6 --lr 1e-3 --warmup 50 --ema 0.99 --batch-size 32)
}

# show NAME RUN FOLDER [flags of sample.py]: sample the first seed of a run: a column of a picture
show() {
  local run=$RUNS/$2-seed$FIRST_SEED
  launch sample.py --ckpt "$run/ckpt.pt" "${@:4}" --out "$run/$3" --if-needed
  SHOWN+=(--column "$1=$run/$3/samples.npz")
}

# figure FILE [flags of figures.py]: the picture of the columns so far
figure() {
  python -m pages.figures "${SHOWN[@]}" --data-dir "$DATA_DIR" "${@:2}" --out "$PAGES/$1.png"
  SHOWN=()
}

# page TABLE [FILE]: the page of one of the tables in paper_results.json, from the rows so far
page() {
  python -m pages.report --paper $1 --setting "$SETTING" "${ROWS[@]}" \
    --out "$PAGES/$TARGET/$SETTING/${2:-report}.md"
  ROWS=()
}

# --------------------------------------------------------------------------------------------------
# The paper's tables: one block per target

case $TARGET in
  table1)                       # Low-rank variants of CBDM
    ddpm; cbdm
    row "CBDM (theta_g + theta_e)" cbdm-low-rank --base cbdm --cm --lam 0
    row "CBDM (LoRA)" cbdm-lora --base cbdm --lora --init-from "$RUNS/cbdm-seed@SEED/ckpt.pt"
    cm
    page table1 ;;
  table2)                       # Tables 2 and G.1: all baselines
    ddpm
    row +ADA ada --base ddpm --no-cm --ada 0.12
    row +RS rs --base ddpm --no-cm --resample 0.5
    row +Focal focal --base focal --no-cm
    cbdm; oc; cm
    page table2 ;;
  table3)                       # Tables 3 and G.4, Figure 2(c): Many, Medium and Few
    four
    page table3 ;;
  table4)                       # Tables 4 and G.2: CelebA-HQ, per class
    four -- --per-class
    page table4 ;;
  table5)                       # DATASET=imagenet-lt or inat2018, RESOLUTION=32 or 64
    four
    page table5 ;;
  table6)                       # Tables 6 and G.3: Stable Diffusion on ArtBench-10,
    sd DDPM ddpm --base ddpm --no-cm        # after pip install diffusers transformers
    sd CBDM cbdm --base cbdm --no-cm
    sd OC oc --base oc --no-cm
    sd CM cm --base oc --cm
    page table6 ;;
  table7)                       # Tables 7, G.5, G.6: theta_g alone; without one of CM's two terms
    ddpm
    row "CM (theta_g)" cm --base oc --cm -- --branch general
    cm
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
  tableG8)                      # Classification with generated images in the training set
    classes "No augmentation" plain
    extra_images ddpm --base ddpm --no-cm
    extra_images cm --base oc --cm
    classes DDPM ddpm --extra "$RUNS/ddpm-seed@SEED/extra/samples.npz"
    classes CM cm --extra "$RUNS/cm-seed@SEED/extra/samples.npz"
    page tableG8 ;;
  tableG9)                      # Consistency models
    row "Consistency model" consistency --base consistency --no-cm
    row "CM on Consistency model" cm-consistency --base consistency --cm
    page tableG9 ;;
  tableG10)                     # DPM-Solver with 15 steps
    ddpm -- --sampler dpm
    cm -- --sampler dpm
    page tableG10 ;;
  tableG11)                     # Text to image from scratch, as table6 with diffusers installed
    if [[ $SCALE == demo ]]; then
      small_parts
    elif [[ -n ${MODEL:-} ]]; then
      PARTS=(--autoencoder "$MODEL" --text-encoder "$MODEL")
    fi
    text "Latent diffusion" ddpm --base ddpm --no-cm
    text CM cm-ddpm --base ddpm --cm $CM_FLAGS
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
    ddpm; cm
    python prune_probe.py \
      --ckpt "$RUNS/ddpm-seed$FIRST_SEED/ckpt.pt" "$RUNS/cm-seed$FIRST_SEED/ckpt.pt" \
      --fractions 0.05,0.1,0.2,0.3 --out "$PAGES/fig1b/$SETTING" ;;
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
      SUFFIX=-mult${MULT// /}
      # The paper's own width: these are the runs of table2
      if [[ $SCALE == paper && $MULT == "1 2 2 2" && $FLAGS != *--ch-mult* ]]; then
        SUFFIX=
      fi
      row "OC, $MULT" oc$SUFFIX --base oc --no-cm --ch-mult $MULT
      row "CM, $MULT" cm$SUFFIX --base oc --cm --ch-mult $MULT
    done
    page fig4d ;;
  theory)                       # Theorems 2.1, 3.1, F.1 and F.2, compared with simulation
    python theory_sim.py --out "$PAGES/theory" ;;
  allocation)                   # What the reserved part is and does
    row "CM (theta_g)" cm --base oc --cm -- --branch general
    cm
    CM=$RUNS/cm-seed$FIRST_SEED
    python -m probes.capacity allocation --ckpt "$CM/ckpt.pt" \
      --quality "$CM/eval-plain.json" "$CM/eval-__branch_general.json" ;;
  dominance)                    # Theorem 2.1 on the gradients of a trained network
    ddpm; cm
    python -m probes.capacity dominance --ckpt "$RUNS/ddpm-seed$FIRST_SEED/ckpt.pt"
    python -m probes.capacity dominance --ckpt "$RUNS/cm-seed$FIRST_SEED/ckpt.pt" ;;
  gain)     # Not in the paper: what CM adds to DDPM and to OC, without and with guidance
    # A step of CM takes as long as 1.7 steps without (bench.py)
    LONG=$((17 * ${STEPS:-300000} / 10))
    for OMEGA in 0 1.5; do
      ddpm -- --guidance $OMEGA
      row "CM on DDPM" cm-ddpm --base ddpm --cm -- --guidance $OMEGA
      row "DDPM, as long" ddpm-long --base ddpm --no-cm --steps $LONG -- --guidance $OMEGA
      oc -- --guidance $OMEGA
      cm -- --guidance $OMEGA
      row "OC, as long" oc-long --base oc --no-cm --steps $LONG -- --guidance $OMEGA
      page table3 guidance-$OMEGA
    done ;;
  pictures)                     # Training images, and beside them samples of DDPM and of CM on it
    train ddpm $FIRST_SEED --base ddpm --no-cm
    train cm-ddpm $FIRST_SEED --base ddpm --cm
    show DDPM ddpm samples --num "${NUM:-400}"
    show "CM on DDPM" cm-ddpm samples --num "${NUM:-400}"
    figure pictures/$SETTING ;;
  figures)  # Figures 1(a), 3, G.4 to G.12: classes in rows, methods in columns, from the same noise
    train ddpm $FIRST_SEED --base ddpm --no-cm
    train cbdm $FIRST_SEED --base cbdm --no-cm
    train oc $FIRST_SEED --base oc --no-cm
    train cm $FIRST_SEED --base oc --cm
    ROWS_OF=(--num "${NUM:-400}" ${CLASSES:+--classes "$CLASSES"})
    show DDPM ddpm figures/classes "${ROWS_OF[@]}"
    show CBDM cbdm figures/classes "${ROWS_OF[@]}"
    show OC oc figures/classes "${ROWS_OF[@]}"
    show CM cm figures/classes "${ROWS_OF[@]}"
    figure figures/$SETTING/methods ${CLASSES:+--classes "$CLASSES"}
    # What theta_g lacks (Fig. G.4)
    show "theta_g alone" cm figures/classes-general --branch general "${ROWS_OF[@]}"
    show "theta = theta_g + BA" cm figures/classes "${ROWS_OF[@]}"
    figure figures/$SETTING/theta_g ${CLASSES:+--classes "$CLASSES"}
    # How different the images of one rare class are (Fig. 3, G.5)
    show DDPM ddpm figures/tail --classes "${TAIL:-rarest}" --num 25
    show CM cm figures/tail --classes "${TAIL:-rarest}" --num 25
    figure figures/$SETTING/tail --across 5 --down 5 ;;
  *)
    echo "error: unknown target '$TARGET'; see the head of run_all.sh" >&2
    exit 2 ;;
esac
