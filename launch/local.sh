#!/usr/bin/env bash
# A run on this machine: on every GPU of it, or on the CPU where there is none. Arguments are those of `genscale train`:
#   bash launch/local.sh --config configs/gpt/demo.yaml
#   STRATEGY=zero2 PROCESSES=4 bash launch/local.sh --config configs/gpt/demo.yaml --run.name demo-zero2
# STRATEGY names a file of launch/ (default ddp), PROCESSES how many to start (default: one a GPU, or 1).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"

strategy=${STRATEGY:-ddp}
file=$root/launch/$strategy.yaml
[ -f "$file" ] || die "STRATEGY: $strategy is not one of $(basename -s .yaml -a "$root"/launch/*.yaml | grep -vx site | xargs)"
bin=${GENSCALE_VENV:-$root/.venv}/bin
[ -x "$bin/accelerate" ] || bin=$(dirname "$(command -v accelerate)") || die "accelerate is not installed; run launch/quickstart.sh once"

gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "PROCESSES: $processes is not a number of processes"
((gpus == 0 || processes <= gpus)) || die "PROCESSES: $processes is more than the $gpus GPUs of this machine; nearest allowed: $gpus"
say "$processes process$( ((processes == 1)) || echo es) on $( ((gpus)) && echo "$gpus GPUs" || echo "the CPU"), $strategy"
exec "$bin/accelerate" launch --config_file "$file" --num_processes "$processes" "$root/train.py" "$@"
