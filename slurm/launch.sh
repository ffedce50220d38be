#!/usr/bin/env bash
# Start one rank under srun: set the variables of torch.distributed from SLURM's, then run train.py.
set -euo pipefail
trap '' USR1 # until train.py handles it; job.sh repeats the signal

# "2(x3),1" means three nodes with two tasks and one node with one.
tasks=()
IFS=, read -ra groups <<< "$SLURM_STEP_TASKS_PER_NODE"
for group in "${groups[@]}"; do
  times=1
  if [[ $group =~ \(x([0-9]+)\) ]]; then times=${BASH_REMATCH[1]}; fi
  for ((i = 0; i < times; i++)); do tasks+=("${group%%(*}"); done
done

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${tasks[$SLURM_NODEID]}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# LOCAL_RANK is the index of the device among those visible to the task: all of the node (--gpus-per-node), or only its
# own (--gpus-per-task), which has index 0.
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -ra visible <<< "$CUDA_VISIBLE_DEVICES"
  gpus=${SLURM_GPUS_ON_NODE:-${#visible[@]}}
  if ((gpus < LOCAL_WORLD_SIZE)); then
    echo "error: $LOCAL_WORLD_SIZE tasks on $(hostname) have $gpus GPU(s), but each rank needs its own." \
      "Set --ntasks-per-node to the number of --gpus-per-node." >&2
    exit 2
  fi
  if ((${#visible[@]} < LOCAL_WORLD_SIZE)); then LOCAL_RANK=0; fi
fi

exec python train.py "$@"
