# shellcheck shell=bash
# What train.sbatch and sweep.sbatch share: sourced at their start, in the project's directory.
#
# SLURM warns a job before its time limit and, where the site says so, before preemption: USR1 to the batch script. The
# trap stands from here on, since the script would die of a signal that comes while it still prepares.
interrupted='' step=''
trap 'interrupted=yes; forward' USR1 TERM

# Pass the warning on to all ranks, as USR1: TERM would make srun kill them. Repeated, since they ignore it until
# train.py listens.
forward() {
  if [[ -n $step ]]; then
    while kill -USR1 "$step"; do sleep 5; done 2> /dev/null &
  fi
}

# Run train.py with these arguments, one task a rank; ends the batch script with its exit code.
run_job() {
  local nodes code
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun asks again
  # Ranks end at different moments, after a signal as well: the first must not end the others. But where one has failed,
  # the others may wait for it in a collective, for which they have this many seconds.
  srun --kill-on-bad-exit=0 --wait="${STEP_WAIT:-45}" bash slurm/launch.sh "$@" &
  step=$!
  if [[ -n $interrupted ]]; then forward; fi
  while
    interrupted='' code=0
    wait "$step" || code=$?
    [[ -n $interrupted ]] # then it was the signal that ended the wait
  do :; done
  # 75: interrupted and saved. 143: died of TERM, which preemption sends to the tasks, before train.py listened.
  # The state is another one where the job was cancelled meanwhile or is being requeued already.
  if ((code == 75 || code == 143)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "job $SLURM_JOB_ID: interrupted (exit code $code), to be requeued"
    scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: not requeued; submit it again to go on"
  fi
  exit "$code"
}
