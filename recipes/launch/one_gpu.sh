#!/usr/bin/env bash
# One device: bash one_gpu.sh RECIPE OUT [OPTIONS]
set -euo pipefail
recipe=$1 out=$2
shift 2
exec llamamoe pretrain --recipe "$recipe" --out "$out" --resume "$@"
