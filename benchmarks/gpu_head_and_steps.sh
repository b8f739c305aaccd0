#!/usr/bin/env bash
# What only a GPU can tell of the head and of whole steps, in one command and about eight minutes on one card of 80 GB
# (much of it imports: torch, transformers and TRL took a process 14 s on the host of an H200):
#
#   DATA=FOLDER OUT=results/gpu bash benchmarks/gpu_head_and_steps.sh
#
# DATA holds alpaca/ and tokenizers/; OUT gets training.json, the tables (*.txt) and each part's exit status. Needs no
# network. PYTHON is the interpreter (python3), with convexlm's dependencies and torch for CUDA; Liger and
# cut-cross-entropy are measured where they can be imported. Every part has a limit of its own: one that ends early or
# late takes nothing from the others, and tables that were finished by then are kept.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DATA=${DATA:?set DATA to the folder with alpaca/ and tokenizers/}
OUT=${OUT:-results/gpu}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
: >"$OUT/parts.txt"

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 status begin=$SECONDS
  shift 2
  timeout --signal=TERM --kill-after=10 "$limit" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.err"
  status=$?
  echo "$name: exit status $status after $((SECONDS - begin)) s of $limit" | tee -a "$OUT/parts.txt"
  tail -n 40 "$OUT/$name.txt"
  [ "$status" -eq 0 ] || tail -n 5 "$OUT/$name.err"
}

bench() { # NAME SECONDS OPTIONS...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" benchmarks/training.py --data "$DATA" --output "$OUT/training" "$@"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$OUT/card.txt"
part tests 75 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/test_head_gpu.py
bench head-7b 120 --level head --dtypes bfloat16 --repeats 7 --shapes "LLaMA-7B, 4096 x 32000" \
  --candidates products convexlm-convex convexlm-mle convexlm-convex-recompute trl full-logits liger
bench head-150k 100 --level head --dtypes bfloat16 --repeats 5 --shapes "4096 x 151936" \
  --candidates products convexlm-convex convexlm-mle trl liger
bench steps 150 --level step --model 7b --layouts padded --batch 32 --steps 6 \
  --candidates convexlm-mle convexlm-convex reference
bench lora 90 --level step --model 7b --lora --layouts padded --batch 32 --steps 6 \
  --candidates convexlm-mle reference
cat "$OUT/parts.txt"
