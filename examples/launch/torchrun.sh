#!/usr/bin/env bash
# On every machine, with the same HEAD (a host name or address of one of them) and a folder that all of them share:
#   HEAD=node0 NODES=2 examples/launch/torchrun.sh examples/trainer.py --output /shared/run ...
# A process that dies ends all of them; --max-restarts starts them again, and they resume from the last complete checkpoint.
set -euo pipefail
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-8}" --rdzv-backend c10d \
	--rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id "${RUN:-fdd}" --max-restarts "${RESTARTS:-3}" "$@"
