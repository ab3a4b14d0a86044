#!/usr/bin/env bash
# All GPUs of one machine: bash one_node.sh RECIPE OUT [OPTIONS]; GPUS=4 takes fewer.
set -euo pipefail
recipe=$1 out=$2
shift 2
exec torchrun --standalone --nproc_per_node "${GPUS:-gpu}" \
    -m llamamoe_cli pretrain --recipe "$recipe" --out "$out" --resume "$@"
