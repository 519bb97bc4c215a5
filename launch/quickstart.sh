#!/usr/bin/env bash
# From nothing to a trained model: makes .venv, installs genscale, trains the demo. Arguments are settings of the run:
#   bash launch/quickstart.sh --train.steps 100
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"

prepare_environment ""
cd "$root"
say "training: genscale train --config configs/gpt/demo.yaml $*"
exec "$venv/bin/genscale" train --config configs/gpt/demo.yaml "$@"
