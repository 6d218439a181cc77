#!/usr/bin/env bash
# One command for a machine with a GPU of compute capability 9.0 or 8.x and no network: builds, tests the kernels on the GPU, runs them under
# compute-sanitizer, and measures them against cuBLAS and what else is installed. Needs nvcc, cmake, g++ and a python3 with torch, pytest and
# pybind11. Takes less than 9 minutes: every phase has a limit, and one that fails or runs out of time costs its own results alone.
#
#   bench/h200.sh [FOLDER]       writes FOLDER/gpu-DATE.json and .log; relative to the repository (default: bench/results)
#   VLLM_LIBRARY=PATH            a vLLM extension library, whose Marlin kernel is measured too
#   PYTHON=python3
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
folder=${1:-bench/results}
build=build/gpu
stamp=$(date -u +%F)
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

stop() {
  echo "bench/h200.sh: $1" >&2
  exit 1
}
command -v nvidia-smi >/dev/null || stop "no GPU: there is no nvidia-smi"
gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>&1 | head -n 1) || stop "no GPU: nvidia-smi says: $gpu"
command -v nvcc >/dev/null || stop "no nvcc on PATH"
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  stop "$PYTHON has no torch that sees the GPU (PYTHON=… names another)"
mkdir -p "$folder" || stop "cannot make $folder"
log=$folder/gpu-$stamp.log
: >"$log" || stop "cannot write $log"

summary=()
# phase NAME SECONDS COMMAND…: runs it with a limit, keeps its output in the log, and notes how it ended.
phase() {
  local name=$1 limit=$2 begin=$SECONDS left=$((525 - SECONDS)) code
  shift 2
  limit=$((left < limit ? left : limit))
  if ((limit < 5)); then
    summary+=("$name: left out, the time is over")
    return 1
  fi
  echo "== $name" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  code=$?
  case $code in
    0) summary+=("$name: done in $((SECONDS - begin)) s") ;;
    124 | 137) summary+=("$name: stopped after $limit s") ;;
    *) summary+=("$name: FAILED with code $code: $(tail -n 1 "$log")") ;;
  esac
  echo "   ${summary[-1]}"
  return $code
}

finish() {
  "$PYTHON" bench/gpu_results.py "$parts" "$folder/gpu-$stamp.json" "${summary[@]}" || stop "the results could not be put together"
  printf '%s\n' "" "$gpu" "${summary[@]}" "$folder/gpu-$stamp.json" "$log"
}

configure=(cmake -S . -B "$build" -DPYENGINE_CUDA=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")")
configure+=(-DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/pyengine")
pybind=$("$PYTHON" -c 'import pybind11; print(pybind11.get_cmake_dir())' 2>/dev/null) && configure+=(-Dpybind11_DIR="$pybind")
command -v ninja >/dev/null && configure+=(-G Ninja)
if ! phase configure 30 "${configure[@]}" || ! phase build 150 cmake --build "$build" -j "$(nproc)"; then
  finish
  exit 1
fi

# cuBLAS as torch brings it along.
libraries=$("$PYTHON" -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib")))')
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
qbench=$build/qbench

# measure NAME SECONDS OPTIONS…: a run of qbench whose JSON is a part of the results.
measure() {
  local name=$1 limit=$2
  shift 2
  # shellcheck disable=SC2016  # the inner shell expands them
  phase "$name" "$limit" bash -c 'out=$1; shift; "$@" --json >"$out.partial" && mv "$out.partial" "$out.json"' _ "$parts/$name" \
    "$qbench" --device cuda "$@"
}

phase "tests on the GPU" 90 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/test_cuda*.py tests/test_sample.py
phase "emulator against the GPU" 60 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/emu

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # Several tiles and blocks, which share outputs; rows, inputs and outliers that fill none of them.
    for shape in 5,200,1120 70,200,1120; do
      phase "$tool $shape" 25 compute-sanitizer --tool "$tool" --error-exitcode 9 "$qbench" --device cuda --op qlinear --shape "$shape" --group 32 \
        --outliers 0.02 --check-only
    done
  done
else
  summary+=("memcheck, racecheck: there is no compute-sanitizer")
fi

# The most telling first: what is cut off by the end of the time matters least.
llama=(--model llama-3-8b --op qlinear --check)
for tokens in 1,2,4,8 16,32,64,128 256,1024,2048,4096; do
  measure "w4-outliers1-$tokens" 30 "${llama[@]}" --tokens "$tokens" --outliers 0.01
  measure "w4-$tokens" 30 "${llama[@]}" --tokens "$tokens" --outliers 0
  measure "w8-$tokens" 30 "${llama[@]}" --tokens "$tokens" --bits 8 --outliers 0
done
# Linears with integer activations against cuBLAS's FP16 and INT8, and the sites that make their codes against a copy and a launch for each step.
integers() {
  local whole=(--model llama-3-8b --op qlinear --check --group 0 --outliers 0 --tokens "$1")
  measure "w4a4-$1" 20 "${whole[@]}" --act-bits 4
  measure "w4a8-$1" 20 "${whole[@]}" --act-bits 8
  measure "w8a8-$1" 20 "${whole[@]}" --act-bits 8 --bits 8
  measure "w4a8-columns1-$1" 20 "${whole[@]}" --act-bits 8 --columns 0.01
  measure "w4a8-groups-$1" 20 "${whole[@]}" --act-bits 8 --group 128
}
integers 2048
for bits in 4 8 16; do
  measure "transform-a$bits" 15 --model llama-3-8b --op transform --tokens 2048,1,16 --act-bits "$bits" --check
  measure "transform-alone-a$bits" 10 --op transform --shape 2048,64,64 --act-bits "$bits" --check
done
# shellcheck disable=SC2016
phase peers 40 bash -c '"$1" bench/peers/gpu.py --json "$2"' _ "$PYTHON" "$parts/peers.json"
integers 16,128
measure attention 15 --model llama-3-8b --op attention --tokens 1,8,16 --context 4096 --check
measure small 20 --model llama-3-8b --op rmsnorm --tokens 1,16,2048 --check
finish
