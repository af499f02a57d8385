#!/usr/bin/env bash
# One evaluation over the GPUs of one machine, or of several, by PyTorch's launcher: one process a GPU. ctq itself needs
# no PyTorch; it reads the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
#
#   deploy/torchrun.sh 8 model.ctq --data wiki.test.raw              GPUs, model, options of eval
#   NODES=2 NODE=0 MASTER=10.0.0.1:29500 deploy/torchrun.sh 8 ...    the same on each node, NODE counting from 0
#
# Several nodes: CTQ_TOKEN, the same secret on all of them, keeps other jobs out.
#
# On one machine `ctq eval model.ctq` alone uses all GPUs in one process; this is for where torchrun is what there is.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: [NODES=n NODE=i MASTER=host:port] torchrun.sh GPUS_PER_NODE MODEL [OPTIONS OF ctq eval...]" >&2
  exit 2
fi
gpus="$1" model="$2"
shift 2

launcher=(--nproc-per-node "$gpus")
if [ "${NODES:-1}" -gt 1 ]; then
  master="${MASTER:?host:port of node 0}"
  launcher+=(--nnodes "$NODES" --node-rank "${NODE:?number of this node, from 0}")
  launcher+=(--master-addr "${master%:*}" --master-port "${master##*:}")
else
  launcher+=(--standalone)
fi

# --no-python: ctq is a program, not a script.
exec torchrun "${launcher[@]}" --no-python ctq eval "$model" "$@"
