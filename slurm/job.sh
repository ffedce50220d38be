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

# Print a port from 10000 to 29999 on which nothing listens on this node, the first of the job.
free_port() {
  local port
  while port=$((10000 + RANDOM % 20000)) && (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do :; done
  echo "$port"
}

# Print the optimizer step that the run of these arguments has reached; nothing if there is none.
reached() {
  local word previous='' directory=''
  for word in "$@"; do
    if [[ $word == --output[_-]dir=* ]]; then directory=${word#*=}; fi
    if [[ $previous == --output[_-]dir ]]; then directory=$word; fi
    previous=$word
  done
  sed -n 's/.*"step": \([0-9]*\).*/\1/p' "$directory/status.json" 2> /dev/null || true
}

# Return whether the job was interrupted at the same step MAX_STALLED times in a row, and count this time.
stalled() {
  local file=slurm/logs/.interrupted-$SLURM_JOB_ID step last='' times=0
  step=step-$(reached "$@")
  if [[ -f $file ]]; then read -r last times < "$file"; fi
  if [[ $step != "$last" ]]; then times=0; fi
  echo "$step $((times + 1))" > "$file"
  ((times + 1 >= ${MAX_STALLED:-5}))
}

# Return whether the job still runs: its state differs if it was cancelled or is already being requeued.
running() {
  local pause state
  for pause in 1 4 15 0; do
    if state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T); then
      [[ $state == RUNNING ]]
      return
    fi
    sleep "$pause"
  done
  echo "job $SLURM_JOB_ID: squeue fails, so the job is not requeued; submit it again to resume"
  return 1
}

# Run train.py with these arguments, one task per rank, and exit with its exit code.
run_job() {
  local nodes code
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${nodes[0]} MASTER_PORT
  MASTER_PORT=$(free_port)
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
  if ((code == 75 || code == 143)) && running; then
    if stalled "$@"; then
      echo "job $SLURM_JOB_ID: interrupted ${MAX_STALLED:-5} times without a further step (exit code $code), not" \
        "requeued. Allow more time before the signal (--signal, --time) and submit it again to resume."
    else
      echo "job $SLURM_JOB_ID: interrupted (exit code $code), requeueing"
      scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: not requeued; submit it again to resume"
    fi
  fi
  exit "$code"
}
