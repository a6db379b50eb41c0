# shellcheck shell=bash
# Functions that the templates share. A template sets `here`, the folder of this file, sources it,
# and calls one of the last two functions.

set -euo pipefail
here=${here:?"set by the templates"}
repository=$(dirname "$here")
# shellcheck source=/dev/null
source "${MAE_SCALE_SITE:-$here/site.sh}"

# The last task of an array has the job number of the whole array, so a task needs its full name.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

task_options=() # options of srun

say() { printf '%(%T)T slurm: %s\n' -1 "$*"; }

die() {
  say "$*" >&2
  exit 2
}

# Find Python, and the words that go before it, by the site settings.
python=()
find_python() {
  if [[ -n $MAE_MODULES ]]; then
    set +u # scripts of others may use unset variables
    # shellcheck source=/dev/null
    command -v module >/dev/null || source /etc/profile
    # shellcheck disable=SC2086  # several words
    module load $MAE_MODULES
    set -u
  fi
  local mounts=()
  case $MAE_CONTAINER in
    pyxis:*)
      [[ -z $MAE_MOUNTS ]] || mounts=("--container-mounts=$MAE_MOUNTS")
      task_options+=("--container-image=${MAE_CONTAINER#pyxis:}" "${mounts[@]}")
      python=(python3)
      ;;
    apptainer:*)
      [[ -z $MAE_MOUNTS ]] || mounts=(--bind "$MAE_MOUNTS")
      [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || mounts+=(--nv)
      python=(apptainer exec "${mounts[@]}" "${MAE_CONTAINER#apptainer:}" python3)
      ;;
    "")
      if [[ -z $MAE_VENV && -x $repository/.venv/bin/python3 ]]; then
        MAE_VENV=$repository/.venv
      fi
      if [[ -n $MAE_VENV && ! -x $MAE_VENV/bin/python3 ]]; then
        die "MAE_VENV=$MAE_VENV holds no bin/python3 (slurm/site.sh)"
      fi
      python=("${MAE_VENV:+$MAE_VENV/bin/}python3")
      ;;
    *) die "MAE_CONTAINER=$MAE_CONTAINER is neither pyxis:IMAGE nor apptainer:FILE" ;;
  esac
}

# Place one task per GPU; on nodes without GPUs as many as were asked for, or one. The tasks of a
# node share its CPUs.
place_tasks() {
  local per_node=${SLURM_GPUS_ON_NODE:-1}
  if [[ -n ${SLURM_NTASKS_PER_NODE:-}${SLURM_NTASKS:-} ]]; then
    per_node=${SLURM_TASKS_PER_NODE:-1} # such as 2(x8)
    per_node=${per_node%%[!0-9]*}
  else
    task_options+=("--ntasks=$((per_node * SLURM_JOB_NUM_NODES))" "--ntasks-per-node=$per_node")
  fi
  local cpus=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / per_node))}
  if ((cpus < 1)); then
    die "$SLURM_CPUS_ON_NODE CPUs on a node for $per_node tasks: ask for whole nodes" \
      "(--exclusive) or for CPUs (--cpus-per-gpu, --cpus-per-task)"
  fi
  task_options+=("--cpus-per-task=$cpus")
  if [[ $(scontrol show config | grep '^TaskPlugin ') == *@(affinity|cgroup)* ]]; then
    task_options+=("--cpu-bind=$MAE_CPU_BIND")
  fi
  # Tasks of a node reach each other's GPUs directly only where each of them sees all of them. GPUs
  # are numbered socket by socket as a rule, but Slurm deals tasks out to the sockets in turn.
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    task_options+=("--gpu-bind=none" "--distribution=${SLURM_DISTRIBUTION:-block:block}")
  fi
}

# Let the ranks meet at the first node, by the address that Slurm itself uses, since the node's name
# need not resolve.
choose_meeting_point() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=${MASTER_PORT:-$((12000 + SLURM_JOB_ID % 20000))}
  export MASTER_ADDR MASTER_PORT
  if [[ -n $MAE_INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$MAE_INTERFACE GLOO_SOCKET_IFNAME=$MAE_INTERFACE
  fi
}

# Print one line of the job's record, such as "JobState=RUNNING Reason=None ...".
record() {
  scontrol --oneliner show job "$job" | head -n 1
}

# Requeue the job after exit code 85. Slurm counts a job that ends by itself as completed, whatever
# ended it, and requeues only jobs that it kills; so the job asks for its requeue itself. The state
# of the job says what happened:
#   running            a signal before the time limit, or a preemption with grace: requeue
#   over, TimeLimit    the limit came during the save: requeue
#   over, otherwise    scancel: the job ends; or Slurm has requeued the job already
requeue() {
  local now
  until now=$(record); do
    say "slurmctld does not answer; trying again"
    sleep 10 || true
  done
  case $now in
    *" JobState=RUNNING "* | *" Reason=TimeLimit "*) ;;
    *" Restarts=${SLURM_RESTART_COUNT:-0} "*)
      say "saved, and cancelled: the job ends; sbatch goes on from here"
      exit 85
      ;;
    *)
      say "saved; Slurm has requeued the job"
      exit 85
      ;;
  esac
  say "saved; requeueing job $job"
  # Slurm then ends this script and its children, perhaps before scontrol has its answer.
  local refused=0
  scontrol requeue "$job" &
  wait $! || refused=$?
  if ((refused > 0 && refused < 128)); then
    say "the job could not be requeued; sbatch goes on from here"
  fi
}

# Wait for Slurm after a failure on a node that no longer answers: it requeues the job once the node
# counts as down (SlurmdTimeout), unless the job has ended before.
wait_for_verdict() {
  local seconds
  is_running || return 0
  if srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" true 2>/dev/null; then
    return 0
  fi
  seconds=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
  say "a node does not answer; waiting up to $((${seconds:-300} + 60)) s for Slurm's verdict"
  for ((seconds = ${seconds:-300} + 60; seconds > 0; seconds -= 2)); do
    is_running || return 0
    sleep 2 || true
  done
}

is_running() { [[ $(record) == *" JobState=RUNNING "* ]]; }

# launch COMMAND ...: run a command under srun, one process per task, and act on its exit code.
launch() {
  # Slurm also signals this script, which must outlive the tasks to see their exit code.
  trap : TERM USR1 INT HUP CONT
  say "job $job, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST:" \
    "srun ${task_options[*]} $*"
  local code=0
  # A signal that comes while Python starts would kill it and look like a failure. So signals are
  # ignored until the program handles them; before that there is nothing to save.
  srun "${task_options[@]}" bash -c 'trap "" TERM USR1; exec "$@"' bash "$@" || code=$?
  case $code in
    0) say "finished" ;;
    85) requeue ;;
    2) say "bad settings (exit code 2): see the error above" ;;
    *)
      say "failed with exit code $code: see the error above"
      wait_for_verdict
      ;;
  esac
  exit "$code"
}

# run_mae_scale COMMAND ARGUMENTS ...: run the program on all tasks.
run_mae_scale() {
  find_python
  place_tasks
  choose_meeting_point
  launch "${python[@]}" -m mae_scale "$@"
}

# shard_imagenet ARGUMENTS ...: write this array task's share of the shards. An array of another
# size, or a single task, also writes what is missing after an earlier array.
shard_imagenet() {
  find_python
  local index=$(((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
  task_options+=(--nodes=1 --ntasks=1 "--cpus-per-task=$SLURM_CPUS_ON_NODE")
  launch "${python[@]}" "$repository/data_prep/shard_imagenet.py" \
    --workers "$SLURM_CPUS_ON_NODE" "$@" \
    --num-tasks "$SLURM_ARRAY_TASK_COUNT" --task-index "$index"
}
