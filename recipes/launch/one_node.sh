#!/usr/bin/env bash
# All GPUs of one machine: bash one_node.sh RECIPE OUT [OPTIONS]; GPUS=4 uses only four.
set -euo pipefail
recipe=$1 out=$2
shift 2
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}"  # seconds for a last checkpoint after SIGTERM
exec torchrun --standalone --nproc_per_node "${GPUS:-gpu}" \
    -m llamamoe_cli pretrain --recipe "$recipe" --out "$out" --resume "$@"
