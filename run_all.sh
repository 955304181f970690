#!/usr/bin/env bash
# Every experiment as plain commands. What is finished is skipped and what was stopped is resumed,
# so it is safe to start this script again.
#
#   bash run_all.sh          the demo: DDPM, OC and CM on long-tailed digits,
#                            9 to 19 minutes on two CPU cores
#   bash run_all.sh smoke    the commands of the demo with a few steps of everything: a minute
#   bash run_all.sh table2   one of the paper's tables; out/table2/SETTING/report.md shows its
#                            numbers with the paper's beside them
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
#   SEEDS         0,1,2       one run per seed; different whole numbers
#   NGPU          1           how many GPUs; more than one: torchrun
#   DATA_DIR      data        where the data set is
#   PRESET        paper       small or tiny: smaller networks, fewer steps (see train.py)
#   RESOLUTION                the images' size in pixels (imagenet-lt, inat2018: 64; tableG11: 256)
#   CLASS_ORDER               all classes, the most frequent one first (if not given: as train.py)
#   SCALE         paper       demo: everything on digits, in minutes, with defaults of its own;
#                             tableG11 on a folder of images, DATA_DIR, one sub-folder per class
#
# For a budget of your own, with runs and pages in a folder of their own:
#
#   ROOT          out/paper   the runs' folder; if it is given, the pages are in it as well
#                             (no "=" and no comma, which report.py's --row reads in its own way)
#   STEPS                     training steps
#   FLAGS                     more flags of train.py (in tableG11 of text_to_image.py train), for
#                             example "--ch 64 --lr 5e-4"; none that a variable above or the
#                             target sets
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

# fail MESSAGE: end with one line on stderr and exit code 2, as the Python scripts do
fail() {
  echo "error: $1" >&2
  exit 2
}

if (( $# > 1 )); then
  fail "run_all.sh takes one target, and '$2' follows '$1'; start it once per target"
fi

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
  python -m recognition.classify --dataset digits --epochs $EPOCHS --out $OUT/classifier --if-needed

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

if [[ $TARGET == demo ]]; then
  OUT=out/demo
  EPOCHS=30
  STEPS=2000
  GRIDS=500
  NUM=2000
  DDIM=50
  REPEATS=10
  TRIALS=20000
  demo
  exit
fi

if [[ $TARGET == smoke ]]; then
  OUT=out/smoke
  EPOCHS=1
  STEPS=8
  GRIDS=0
  NUM=100
  DDIM=3
  REPEATS=1
  TRIALS=500
  rm -rf $OUT
  demo
  exit
fi

# --------------------------------------------------------------------------------------------------
# The paper's tables: settings

SCALE=${SCALE:-paper}
NGPU=${NGPU:-1}
FLAGS=${FLAGS:-}
CM_FLAGS=${CM_FLAGS:-}
PAGES=${ROOT:-out}

# check_settings: end where a variable cannot be what was meant, before any work
check_settings() {
  local seed before=, word
  # A pattern of two lines would be found where one of them is
  if [[ ! $TARGET =~ ^[a-zA-Z0-9]+$ ]] || ! grep -qxF "  $TARGET)" run_all.sh; then
    fail "unknown target '${TARGET//$'\n'/ }'; see the head of run_all.sh"
  fi
  # Of two such flags in a command the last one counts, and nothing would say so
  for word in $FLAGS $CM_FLAGS; do
    case ${word%%=*} in
      --seed | --out | --base | --cm | --no-cm | --dataset | --ir | --data-dir | --steps | \
        --resolution | --class-order)
        fail "FLAGS, CM_FLAGS: ${word%%=*} is set by the target or by a variable (see the head of \
run_all.sh); leave it out" ;;
    esac
  done
  if [[ $SCALE != paper && $SCALE != demo ]]; then
    fail "SCALE='$SCALE': must be paper or demo"
  fi
  if [[ $SCALE == demo && $TARGET == table6 ]]; then
    fail "SCALE=demo: table6 fine-tunes Stable Diffusion; there is no demo of it"
  fi
  if [[ $SCALE == demo && $TARGET == tableG11 ]]; then
    if [[ -z ${DATA_DIR:-} || ${DATASET:-folder} != folder ]]; then
      fail "SCALE=demo: tableG11 is on a folder of images; name it with DATA_DIR, without DATASET"
    fi
  elif [[ $SCALE == demo && ${DATASET:-digits} != digits ]]; then
    fail "SCALE=demo is on digits; for DATASET=$DATASET name a budget with STEPS and NUM"
  fi
  if [[ ! $NGPU =~ ^[1-9][0-9]{0,3}$ ]]; then
    fail "NGPU='$NGPU': must be a whole number of GPUs, at least 1"
  fi
  if [[ ! ${SEEDS-0} =~ ^(0|[1-9][0-9]*)(,(0|[1-9][0-9]*))*$ ]]; then
    fail "SEEDS='$SEEDS': must be whole numbers with commas between, for example 0,1,2"
  fi
  if [[ ! ${STEPS:-1} =~ ^[1-9][0-9]*$ ]]; then
    fail "STEPS='$STEPS': must be a whole number of training steps"
  fi
  for seed in ${SEEDS+${SEEDS//,/ }}; do
    if [[ $before == *,$seed,* ]]; then
      fail "SEEDS='$SEEDS': $seed is there twice; name each seed once"
    fi
    before+=$seed,
  done
  # report.py's --row takes NAME=FILE,FILE, and @SEED stands for a seed
  if [[ ${ROOT:-} == *[=,$'\n']* || ${ROOT:-} == *@SEED* ]]; then
    fail "ROOT='${ROOT//$'\n'/ }': '=', ',', '@SEED' and line ends cannot be in it; take another"
  fi
}

check_settings
if [[ $TARGET == tableG11 && $SCALE == paper && -z ${DATASET:-} ]]; then
  for DATASET in cub200 flowers102; do
    DATASET=$DATASET bash run_all.sh tableG11
  done
  exit
fi
DATA_DIR=${DATA_DIR:-data}
PARTS=()                        # the autoencoder and the text encoder of tableG11
if [[ $SCALE == demo ]]; then
  DATASET=digits
  PRESET=digits
  if [[ $TARGET == tableG11 ]]; then
    DATASET=folder
    PRESET=paper
    IR=${IR:-10}
    RESOLUTION=${RESOLUTION:-32}
    STEPS=${STEPS:-800}
  fi
  IR=${IR:-20}
  SEEDS=${SEEDS-0}
  ROOT=${ROOT:-out/paper-demo}
  STEPS=${STEPS:-300}
  NUM=${NUM:-500}
  EPOCHS=${EPOCHS:-60}
  EXTRA=${EXTRA:-500}
  FLAGS="--sample-every 0 $FLAGS"
  if [[ $TARGET != tableG11 ]]; then
    FEATURES=$ROOT/classifier/ckpt.pt
    python -m recognition.classify --dataset digits --epochs 10 --out "$ROOT/classifier" --if-needed
  fi
else
  PRESET=${PRESET:-paper}       # also on a CPU, where train.py takes tiny for folder
  case $TARGET in
    table4) DATASET=${DATASET:-celebahq} ;;
    table5) DATASET=${DATASET:-imagenet-lt} ;;
    table6) DATASET=${DATASET:-artbench10} ;;
    *) DATASET=${DATASET:-cifar100} ;;
  esac
  case $DATASET in            # as train.py's defaults
    folder) IR=${IR:-1} ;;
    cub200 | flowers102) IR=${IR:-10} ;;
    *) IR=${IR:-100} ;;
  esac
  SEEDS=${SEEDS-0,1,2}
  ROOT=${ROOT:-out/paper}
fi

# SETTING: the data set and its ratio, in folders and for report.py; the resolution as well where
# it is not the set's own (see READERS in readers.py); small and tiny have one of theirs
case $DATASET in
  digits) OWN_RESOLUTION=8 ;;
  cifar10 | cifar100) OWN_RESOLUTION=32 ;;
  artbench10) OWN_RESOLUTION=256 ;;
  *) OWN_RESOLUTION=64 ;;
esac
if [[ $TARGET == tableG11 ]]; then
  OWN_RESOLUTION=256            # text_to_image.py's default
fi
if [[ ${RESOLUTION:-} == "$OWN_RESOLUTION" && $PRESET != small && $PRESET != tiny ]]; then
  RESOLUTION=
fi
if [[ $DATASET == imagenet-lt || $DATASET == inat2018 ]]; then
  # These two are long-tailed as they are
  IR=1
  RESOLUTION=${RESOLUTION:-64}
  SETTING=$DATASET-$RESOLUTION
else
  SETTING=$DATASET-ir$IR${RESOLUTION:+-$RESOLUTION}
fi
case $PRESET in               # as train.py's presets
  small) STEPS=${STEPS:-20000} SETTING+=-small ;;
  tiny) STEPS=${STEPS:-4000} SETTING+=-tiny ;;
esac
RUNS=$ROOT/$SETTING

# Some targets look at one network of each kind
FIRST_SEED=${SEEDS%%,*}
case $TARGET in
  fig1b | dominance | allocation | pictures | figures) SEEDS=$FIRST_SEED ;;
esac

DATA=(
  --dataset "$DATASET"
  --ir "$IR"
  --data-dir "$DATA_DIR"
  ${RESOLUTION:+--resolution "$RESOLUTION"}
  ${CLASS_ORDER:+--class-order "$CLASS_ORDER"}
)

# --------------------------------------------------------------------------------------------------
# The paper's tables: how runs become rows, and rows become a page

ROWS=()                         # of a page: report.py's flags
SHOWN=()                        # of a picture: figures.py's flags

# launch SCRIPT [flags], launch -m MODULE [flags]: start a script on one GPU, or on several
launch() {
  local module=()
  if (( NGPU > 1 )); then
    if [[ $1 == -m ]]; then
      module=(-m)
      shift
    fi
    # -- since torchrun would read the --num of a script as its own
    torchrun --nproc_per_node=$NGPU ${module[@]+"${module[@]}"} -- "$@"
  else
    python "$@"
  fi
}

# train RUN SEED [flags of train.py]: train a run with a seed; @SEED in a flag stands for the seed
train() {
  local run=$1 seed=$2 cm_flags= word
  shift 2
  for word in "$@"; do
    if [[ $word == --cm ]]; then
      cm_flags=$CM_FLAGS
    fi
  done
  launch train.py "${DATA[@]}" --preset "$PRESET" ${STEPS:+--steps "$STEPS"} $FLAGS \
    "${@//@SEED/$seed}" $cm_flags --seed $seed --out "$RUNS/$run-seed$seed"
}

# add_row NAME START END: add a row to the page, of the JSON files START<seed>END of all seeds
add_row() {
  local name=$1 start end=$3 files= seed
  # report.py takes *, ? and [ for wildcards, but not in brackets
  start=$(printf %s "$2" | sed 's/[[*?]/[&]/g')
  for seed in ${SEEDS//,/ }; do
    files+="$start$seed$end,"
  done
  ROWS+=(--row "$name=$files")
}

# row NAME RUN [flags of train.py] [-- flags of evaluate.py]:
# train and evaluate a run with each seed, which is also that of the noise that is sampled,
# and add a row to the page
row() {
  local name=$1 run=$2 train_flags=() evaluate_flags=() json seed folder
  shift 2
  while (( $# )) && [[ $1 != -- ]]; do
    train_flags+=("$1")
    shift
  done
  if (( $# )); then
    shift
    evaluate_flags=("$@")
  fi

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

# classes NAME RUN [flags of classify.py]: train a classifier with each seed, and add a row
classes() {
  local name=$1 run=$2 seed
  shift 2
  for seed in ${SEEDS//,/ }; do
    python -m recognition.classify "${DATA[@]}" ${EPOCHS:+--epochs "$EPOCHS"} "${@//@SEED/$seed}" \
      --seed $seed --out "$RUNS/classify-$run-seed$seed" --if-needed
  done
  add_row "$name" "$RUNS/classify-$run-seed" /result.json
}

# extra_images RUN SEED [flags of train.py]: train a run, and generate images for a classifier
extra_images() {
  local run=$1 seed=$2
  local folder=$RUNS/$run-seed$seed
  train "$@"
  launch sample.py --ckpt "$folder/ckpt.pt" --num "${EXTRA:-50000}" --seed $seed \
    --out "$folder/extra" --if-needed
}

# sampled MODULE FOLDER SEED: sample a run of stable_diffusion.py or text_to_image.py, and evaluate it
sampled() {
  launch -m "$1" sample --ckpt "$2/ckpt.pt" --num "${NUM:-50000}" --seed $3 --out "$2/samples" \
    --if-needed
  launch evaluate.py --samples "$2/samples/samples.npz" --data-dir "$DATA_DIR" \
    ${NUM:+--num "$NUM"} ${FEATURES:+--features "$FEATURES"} --if-needed
}

# latent NAME RUN [flags of stable_diffusion.py train]:
# fine-tune Stable Diffusion with each seed, sample, evaluate, and add a row
latent() {
  local name=$1 run=$2 seed folder
  shift 2
  for seed in ${SEEDS//,/ }; do
    folder=$RUNS/latent-$run-seed$seed
    launch -m latent.stable_diffusion train "${DATA[@]}" \
      ${MODEL:+--model "$MODEL"} ${EPOCHS:+--epochs "$EPOCHS"} "$@" --seed $seed --out "$folder"
    sampled latent.stable_diffusion "$folder" $seed
  done
  add_row "$name" "$RUNS/latent-$run-seed" /samples/eval.json
}

# small_parts: the demo's autoencoder, and a classifier to measure with, on the images of DATA_DIR
small_parts() {
  python -m recognition.classify --dataset folder --ir 1 --data-dir "$DATA_DIR" \
    --resolution "${RESOLUTION:-256}" --width 16 --epochs 30 --out "$RUNS/classifier" --if-needed
  FEATURES=$RUNS/classifier/ckpt.pt
  python -m latent.text_to_image autoencoder "${DATA[@]}" --factor 4 --ch 16 --lr 2e-3 --warmup 50 \
    --ema 0.99 --batch-size 32 --steps 400 --sample-every 400 --out "$RUNS/autoencoder"
  PARTS=(
    --autoencoder "$RUNS/autoencoder/ckpt.pt"
    --text-encoder words
    --ch 64 --depth 6 --lr 1e-3 --warmup 50 --ema 0.99 --batch-size 32
  )
}

# text NAME RUN [flags of text_to_image.py train]:
# train a text-to-image model with each seed, sample, evaluate, and add a row
text() {
  local name=$1 run=$2 seed folder
  shift 2
  for seed in ${SEEDS//,/ }; do
    folder=$RUNS/text-$run-seed$seed
    launch -m latent.text_to_image train "${DATA[@]}" ${PARTS[@]+"${PARTS[@]}"} \
      ${STEPS:+--steps "$STEPS"} $FLAGS "$@" --seed $seed --out "$folder"
    sampled latent.text_to_image "$folder" $seed
  done
  add_row "$name" "$RUNS/text-$run-seed" /samples/eval.json
}

# show NAME RUN FOLDER [flags of sample.py]: sample the first seed of a run: a column of a picture
show() {
  local name=$1 folder=$RUNS/$2-seed$FIRST_SEED samples=$RUNS/$2-seed$FIRST_SEED/$3
  shift 3
  launch sample.py --ckpt "$folder/ckpt.pt" "$@" --out "$samples" --if-needed
  SHOWN+=(--column "$name=$samples/samples.npz")
}

# figure FILE [flags of figures.py]: the picture of the columns so far, as PNG and PDF
figure() {
  local file=$PAGES/$1.png flags=("${@:2}")
  python -m pages.figures "${SHOWN[@]}" --data-dir "$DATA_DIR" ${flags[@]+"${flags[@]}"} --out "$file"
  SHOWN=()
}

# page TABLE [FILE]: the page of one of the tables in paper_results.json, from the rows so far
page() {
  local table=$1 file=${2:-report}
  python -m pages.report --paper $table --setting "$SETTING" "${ROWS[@]}" \
    --out "$PAGES/$TARGET/$SETTING/$file.md"
  ROWS=()
}

# --------------------------------------------------------------------------------------------------
# The paper's tables: one block per target

case $TARGET in

  # Low-rank variants of CBDM
  table1)
    ddpm
    cbdm
    row "CBDM (theta_g + theta_e)" cbdm-low-rank --base cbdm --cm --lam 0
    row "CBDM (LoRA)" cbdm-lora --base cbdm --lora --init-from "$RUNS/cbdm-seed@SEED/ckpt.pt"
    cm
    page table1
    ;;

  # Tables 2 and G.1: all baselines
  table2)
    ddpm
    row +ADA ada --base ddpm --no-cm --ada 0.12
    row +RS rs --base ddpm --no-cm --resample 0.5
    row +Focal focal --base focal --no-cm
    cbdm
    oc
    cm
    page table2
    ;;

  # Tables 3 and G.4, Figure 2(c): Many, Medium and Few
  table3)
    ddpm
    cbdm
    oc
    cm
    page table3
    ;;

  # Tables 4 and G.2: CelebA-HQ, per class
  table4)
    ddpm -- --per-class
    cbdm -- --per-class
    oc -- --per-class
    cm -- --per-class
    page table4
    ;;

  # Thousands of classes (DATASET=imagenet-lt or inat2018, RESOLUTION=32 or 64)
  table5)
    ddpm
    cbdm
    oc
    cm
    page table5
    ;;

  # Tables 6 and G.3: Stable Diffusion on ArtBench-10, after pip install diffusers transformers;
  # MODEL is miniSD's folder or its name on the hub
  table6)
    latent DDPM ddpm --base ddpm --no-cm
    latent CBDM cbdm --base cbdm --no-cm
    latent OC oc --base oc --no-cm
    latent CM cm --base oc --cm
    page table6
    ;;

  # Tables 7, G.5 and G.6. Left: theta_g alone. Right: without one of CM's two terms
  table7)
    ddpm
    row "CM (theta_g)" cm --base oc --cm -- --branch general
    cm
    page table7-left theta_g

    ddpm
    oc
    cm
    row "CM w/o L_Con" cm-no-con --base oc --cm --w-con 0
    row "CM w/o L_Div" cm-no-div --base oc --cm --w-div 0
    page table7-right
    ;;

  # One low-rank expert per group
  tableE2)
    ddpm
    row "Group-Expert LoRA" experts --base ddpm --no-cm --experts group
    cm
    page tableE2
    ;;

  # Classification with generated images in the training set
  tableG8)
    classes "No augmentation" plain
    for SEED in ${SEEDS//,/ }; do
      extra_images ddpm $SEED --base ddpm --no-cm
      extra_images cm $SEED --base oc --cm
    done
    classes DDPM ddpm --extra "$RUNS/ddpm-seed@SEED/extra/samples.npz"
    classes CM cm --extra "$RUNS/cm-seed@SEED/extra/samples.npz"
    page tableG8
    ;;

  # Consistency models
  tableG9)
    row "Consistency model" consistency --base consistency --no-cm
    row "CM on Consistency model" cm-consistency --base consistency --cm
    page tableG9
    ;;

  # DPM-Solver with 15 steps
  tableG10)
    ddpm -- --sampler dpm
    cm -- --sampler dpm
    page tableG10
    ;;

  # Latent diffusion from scratch, text to image, after pip install diffusers transformers
  tableG11)
    if [[ $SCALE == demo ]]; then
      small_parts
    elif [[ -n ${MODEL:-} ]]; then
      PARTS=(--autoencoder "$MODEL" --text-encoder "$MODEL")
    fi
    text "Latent diffusion" ddpm --base ddpm --no-cm
    text CM cm-ddpm --base ddpm --cm $CM_FLAGS
    page tableG11
    ;;

  # Overlap optimisation
  tableG12)
    ddpm
    row "Overlap Opt." rop --base rop --no-cm
    cm
    page tableG12
    ;;

  # Long-tailed recognition (also with IR=200)
  tableG13)
    classes CE ce --loss ce
    classes "CE + CM" ce-cm --loss ce --cm
    classes LDAM ldam --loss ldam
    classes "LDAM + CM" ldam-cm --loss ldam --cm
    classes LA la --loss la
    classes "LA + CM" la-cm --loss la --cm
    page tableG13
    ;;

  # Figures 1(b), G.1 and G.2: what pruning does to each class
  fig1b)
    ddpm
    cm
    python prune_probe.py \
      --ckpt "$RUNS/ddpm-seed$FIRST_SEED/ckpt.pt" "$RUNS/cm-seed$FIRST_SEED/ckpt.pt" \
      --fractions 0.05,0.1,0.2,0.3 --out "$PAGES/fig1b/$SETTING"
    ;;

  # CM on each baseline
  fig4a)
    ddpm
    row "CM on DDPM" cm-ddpm --base ddpm --cm
    row +ADA ada --base ddpm --no-cm --ada 0.12
    row "CM on +ADA" cm-ada --base ddpm --cm --ada 0.12
    row +RS rs --base ddpm --no-cm --resample 0.5
    row "CM on +RS" cm-rs --base ddpm --cm --resample 0.5
    row +Focal focal --base focal --no-cm
    row "CM on +Focal" cm-focal --base focal --cm
    cbdm
    row "CM on CBDM" cm-cbdm --base cbdm --cm
    oc
    cm
    page fig4a
    ;;

  # Figures 4(b) and G.3: lambda, which is 1 in CM
  fig4b)
    oc
    for LAM in 0 0.5 0.8 1.2 1.5; do
      row "lambda $LAM" cm-lam$LAM --base oc --cm --lam $LAM
    done
    cm
    page fig4b
    ;;

  # The rank ratio, which is 0.1 in CM
  fig4c)
    oc
    for RATIO in 0.05 0.2 0.3 0.5; do
      row "rank $RATIO" cm-rank$RATIO --base oc --cm --rank-ratio $RATIO
    done
    cm
    page fig4c
    ;;

  # The network's width
  fig4d)
    for MULT in "1 2 2" "1 2 2 2" "1 2 3 4"; do
      SUFFIX=-mult${MULT// /}
      # The paper's own width: these are the runs of table2
      if [[ $SCALE == paper && $MULT == "1 2 2 2" && $FLAGS != *--ch-mult* ]]; then
        SUFFIX=
      fi
      row "OC, $MULT" oc$SUFFIX --base oc --no-cm --ch-mult $MULT
      row "CM, $MULT" cm$SUFFIX --base oc --cm --ch-mult $MULT
    done
    page fig4d
    ;;

  # Theorems 2.1, 3.1, F.1 and F.2, compared with simulation
  theory)
    python theory_sim.py --out "$PAGES/theory"
    ;;

  # What the reserved part is and does
  allocation)
    row "CM (theta_g)" cm --base oc --cm -- --branch general
    cm
    CM=$RUNS/cm-seed$FIRST_SEED
    python -m probes.capacity allocation --ckpt "$CM/ckpt.pt" \
      --quality "$CM/eval-plain.json" "$CM/eval-__branch_general.json"
    ;;

  # Theorem 2.1 on the gradients of a trained network
  dominance)
    ddpm
    cm
    python -m probes.capacity dominance --ckpt "$RUNS/ddpm-seed$FIRST_SEED/ckpt.pt"
    python -m probes.capacity dominance --ckpt "$RUNS/cm-seed$FIRST_SEED/ckpt.pt"
    ;;

  # Not in the paper: what CM adds to DDPM and to OC, seed by seed, without and with guidance
  gain)
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
    done
    ;;

  # A picture: training images, and beside them samples of DDPM and of CM on it
  pictures)
    train ddpm $FIRST_SEED --base ddpm --no-cm
    train cm-ddpm $FIRST_SEED --base ddpm --cm
    show DDPM ddpm samples --num "${NUM:-400}"
    show "CM on DDPM" cm-ddpm samples --num "${NUM:-400}"
    figure pictures/$SETTING
    ;;

  # Figures 1(a), 3 and G.4 to G.12: classes in rows, methods in columns, from the same noise
  figures)
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
    figure figures/$SETTING/tail --across 5 --down 5
    ;;
esac
