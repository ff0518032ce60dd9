#!/usr/bin/env bash
# The first minutes on a GPU: what is wanted most comes first, and nothing that fails stops the rest.
#
#     OUT=folder bash benchmarks/gpu_first.sh [STEP...]
#
# Steps: environment first targets step sweep profile checks store tests matrix; all of them by default,
# in this order, in ten minutes at most (a look with the sanitizer left out). Every step is a process of
# its own with a time limit, and what it finds is in $OUT as soon as it is found: a kernel that spoils the
# device for its process, or hangs, costs its own step. $OUT gets one JSON a step that times or checks
# all, and log.txt.
#
# PYTHON: the Python that has torch and Triton (python3). KERNELS: a .tar.gz of compiled kernels, as
# this script leaves it in $OUT, unpacked where they were compiled. SMOKE=1: a dry run without a GPU.
set -u
out=${OUT:?set OUT to a folder for the results}
mkdir -p "$out" || exit
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit
log=$out/log.txt
smoke=${SMOKE:+--smoke}
export PYTHONPATH=src:. PYTHONUNBUFFERED=1
# Triton keeps the whole path of what it has compiled.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/sixfold-triton}
mkdir -p "$TRITON_CACHE_DIR"
if [ -n "${KERNELS:-}" ]; then tar -xzf "$KERNELS" -C "$TRITON_CACHE_DIR"; fi

steps="environment first targets step sweep profile checks store tests matrix"
chosen=${*:-$steps}
for name in $chosen; do
  case " $steps " in
    *" $name "*) ;;
    *) echo "there is no step $name: expected some of $steps" >&2; exit 2 ;;
  esac
done
failed=

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  case " $chosen " in *" $name "*) ;; *) return ;; esac
  echo "== $name" | tee -a "$log"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  echo "== $name: status $code after $((SECONDS - began)) s" | tee -a "$log"
  if [ "$code" != 0 ]; then failed="$failed $name"; fi
}

# group NAME SECONDS [JSON]
group() {
  step "$1" "$2" "$python" -m benchmarks.gpu --groups "$1" --seconds $(($2 - 10)) \
    --json "${3:-$out/$1.json}" $smoke
}

environment() {
  nvidia-smi
  "$python" -c '
import importlib.metadata as m
for name in ("torch", "triton", "numpy", "transformers", "jaxtyping", "safetensors", "pytest"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "is missing")
import torch
print(torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_name())'
}
export -f environment
export python

step environment 15 bash -c environment
# Its one line is in the log.
group first 45 /dev/null
case $failed in
  # Where, and in which kernel.
  *first*) step first 90 compute-sanitizer --kernel-name-exclude kns=at:: \
    "$python" -m benchmarks.gpu --groups first --json /dev/null ;;
esac
group targets 100
group step 80
group sweep 70
# One call of attention at 4 bits: how much of the device it keeps busy, and with what.
step profile 40 ncu --clock-control none -k regex:attend -c 1 --section SpeedOfLight \
  --section SchedulerStats --section WarpStateStats --section MemoryWorkloadAnalysis \
  "$python" -m benchmarks.gpu --groups first --json /dev/null $smoke
group checks 80
group store 45
step tests 45 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/unit/test_cache_static.py \
  tests/unit/test_cache_operations.py tests/unit/test_cache_engine_gpu.py tests/e2e/test_surroundings.py
group matrix 75

tar -czf "$out/kernels.tar.gz" -C "$TRITON_CACHE_DIR" .
echo "== failed:${failed:- nothing}" | tee -a "$log"
[ -z "$failed" ]
