#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture, without a GPU, and fails on errors, on registers spilled to memory
# and on serialised wgmma. Takes $CTQ_NVCC, else nvcc on the PATH, else NVIDIA's compiler from PyPI in a virtual
# environment of its own (about 500 MB, in $CTQ_CUDA_VENV, else target/cuda-venv).
#
#   scripts/compile-kernels.sh [ARCHITECTURE...]      such as 80 90a; all by default
set -euo pipefail
cd "$(dirname "$0")/.."

architectures=("$@")
[ ${#architectures[@]} -gt 0 ] || architectures=(80 86 89 90a 100a 120a)

nvcc="${CTQ_NVCC:-$(command -v nvcc || true)}"
if [ -z "$nvcc" ]; then
  environment="${CTQ_CUDA_VENV:-target/cuda-venv}"
  # The compiler itself: an installation that broke off is done again.
  if ! "$environment/bin/python" -c 'import nvidia.cu13' 2>/dev/null; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps \
      'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
      'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-nvrtc==13.0.*'
  fi
  nvcc="$("$environment/bin/python" -c 'import nvidia; print(list(nvidia.__path__)[0])')/cu13/bin/nvcc"
fi

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

# One file for one architecture: its line, or what is wrong with it.
compile() {
  local file="$1" architecture="$2" log bad
  log="$("$nvcc" -std=c++17 --fmad=false -cubin -gencode="arch=compute_$architecture,code=sm_$architecture" \
    -Xptxas -v,-warn-spills -o "$folder/$(basename "$file").$architecture.cubin" "$file" 2>&1)" ||
    { printf '%s sm_%s does not compile:\n%s\n' "$file" "$architecture" "$log"; return 1; }
  bad="$(grep -E '[1-9][0-9]* bytes spill|C75[0-9][0-9]|serialized|warning' <<<"$log" || true)"
  [ -z "$bad" ] || { printf '%s sm_%s:\n%s\n' "$file" "$architecture" "$bad"; return 1; }
  printf '%-32s sm_%-5s %3d kernels, at most %3d registers\n' "$file" "$architecture" \
    "$(grep -c 'Compiling entry function' <<<"$log" || true)" \
    "$(grep -oE 'Used [0-9]+ registers' <<<"$log" | grep -oE '[0-9]+' | sort -n | tail -1 || true)"
}
export -f compile
export nvcc folder

# shellcheck disable=SC2016  # the inner shell expands them
for file in kernels/cuda/*.cu; do
  for architecture in "${architectures[@]}"; do
    printf '%s %s\n' "$file" "$architecture"
  done
done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$1" "$2"' compile
