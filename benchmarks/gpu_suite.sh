#!/usr/bin/env bash
# All speed figures of one NVIDIA GPU of 80 GB or more, cut off after eight minutes, into benchmarks/results/:
#
#   pip install -e '.[gpu]' torch transformers && bash benchmarks/gpu_suite.sh
#
# Training steps of DR+DA, LA and DR at 1.17B parameters beside transformers' Qwen3 with LA's shape, the map of DR+DA's
# step, and decoding. A part that fails or takes too long is reported and the next one starts; the result grows by parts.
set -uo pipefail
cd "$(dirname "$0")" || exit
python=${PYTHON:-python}
device=$("$python" -c "import jax; print(jax.devices()[0].device_kind.replace(' ', '-').lower())") || exit 1
out=results/gpu_suite_${device}_$(date +%Y-%m).md
{
  echo "# Training and decoding on one $device"
  echo
  "$python" -c "import jax; print('jax', jax.__version__)"
} > "$out"

part() { # title, seconds, command ...
  local title=$1 seconds=$2
  shift 2
  echo "$title" >&2
  printf "\n## %s\n\n    %s\n\n" "$title" "$*" >> "$out"
  timeout "$seconds" "$python" "$@" >> "$out" || echo "failed, or longer than $seconds s (exit code $?)" >> "$out"
}

for name in DR+DA Qwen3Moe LA DR; do  # apart, so that a part that is cut off costs one row
  part "Training step, $name" 85 train_step.py --size 1b --apart --rounds 3 --steps 3 --warm 8 --no-compile \
    --experts grouped_mm --only "$name"
done
part "Where DR+DA's step goes" 80 profile_step.py --size 1b --variant DR+DA --warm 3 --top 30
for batch in 64 1; do
  part "Decoding, batch $batch" 60 decode.py --size 1b --batches "$batch" --rounds 3
done
echo "$out"
