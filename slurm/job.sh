# shellcheck shell=bash
# Common part of train.sbatch and sweep.sbatch, sourced at their start in the project's directory.
#
# SLURM sends USR1 to the batch script before the time limit and, if the site configures it, before preemption. The trap
# is set first, since an early signal would kill the script.
interrupted='' step=''
trap 'interrupted=yes; forward' USR1 TERM

# Forward the signal to all ranks as USR1, since srun kills the ranks on TERM. Repeat it, since ranks ignore it until
# train.py handles signals.
forward() {
  if [[ -n $step ]]; then
    while kill -USR1 "$step"; do sleep 5; done 2> /dev/null &
  fi
}

# Run train.py with these arguments, one task per rank, and exit with its exit code.
run_job() {
  local nodes code
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun does not inherit it
  # Ranks exit at different times, so the first exit must not kill the others. After a failure the others may wait in a
  # collective; they are killed after this many seconds.
  srun --kill-on-bad-exit=0 --wait="${STEP_WAIT:-45}" bash slurm/launch.sh "$@" &
  step=$!
  if [[ -n $interrupted ]]; then forward; fi
  while
    interrupted='' code=0
    wait "$step" || code=$?
    [[ -n $interrupted ]] # the signal ended the wait, not the step
  do :; done
  # 75: interrupted and saved. 143: killed by TERM, which preemption sends to the tasks, before train.py handled signals.
  # The state differs if the job was cancelled or is already being requeued.
  if ((code == 75 || code == 143)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "job $SLURM_JOB_ID: interrupted (exit code $code), requeueing"
    scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: not requeued; submit it again to resume"
  fi
  exit "$code"
}
