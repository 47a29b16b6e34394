# shellcheck shell=bash disable=SC2034,SC2153  # shared variables; options are set by `parse`
# What happens to a pod, one function a step; create.sh, setup.sh, launch.sh and watch.sh are made
# of these. Sourced after common.sh.

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPO_ROOT="$(dirname "$HERE")"
readonly HERE REPO_ROOT
# On a worker; `~` is left to the worker's shell.
readonly REMOTE="bash ~/iv2_jax/tpu_scripts/worker.sh"

readonly POD_OPTIONS="name topology accelerator-type runtime-version node-count spot reserved
 reservation on-demand network subnetwork internal-ips service-account labels valid-until timeout
 poll"
readonly SETUP_OPTIONS="name commit extras internal-ips no-check"
readonly RUN_OPTIONS="name run compile-cache env env-file internal-ips any-workdir"

# ---- create -------------------------------------------------------------------------------

# read_topology v5p:8x8x8 -> KIND=v5p GRID=8x8x8 CHIPS=512; the notation of `iv2 plan`.
read_topology() {
  [[ "$1" =~ ^(v4|v5e|v5p|v6e|v7x):([0-9]+(x[0-9]+){1,2})$ ]] ||
    die "$EXIT_USAGE" "--topology $(quote "$1"): expected KIND:GRID as in iv2 plan, such as v5e:16x16 or v5p:8x8x8 (kinds: v4 v5e v5p v6e v7x)"
  KIND="${BASH_REMATCH[1]}"
  GRID="${BASH_REMATCH[2]}"
  CHIPS=$((${GRID//x/*}))
}

# shape_arguments: SHAPE, gcloud's words for the chips. v4 and v5p types count TensorCores, two a
# chip, and the same count can be cut into several grids, so those are named by the grid.
shape_arguments() {
  local runtime
  if [[ -n "$ACCELERATOR_TYPE" ]]; then
    [[ -z "$TOPOLOGY" || -n "$RUNTIME_VERSION" ]] || RUNTIME_VERSION=""
    case "$ACCELERATOR_TYPE" in
      v5litepod-*) KIND=v5e ;;
      *) KIND="${ACCELERATOR_TYPE%%-*}" ;;
    esac
    SHAPE=("--accelerator-type=$ACCELERATOR_TYPE")
  else
    need topology
    read_topology "$TOPOLOGY"
    case "$KIND" in
      v5e) SHAPE=("--accelerator-type=v5litepod-$CHIPS") ;;
      v6e) SHAPE=("--accelerator-type=v6e-$CHIPS") ;;
      *) SHAPE=("--type=$KIND" "--topology=$GRID") ;;
    esac
  fi
  case "$KIND" in
    v4) runtime=tpu-ubuntu2204-base ;;
    v5e) runtime=v2-alpha-tpuv5-lite ;;
    v5p) runtime=v2-alpha-tpuv5 ;;
    v6e) runtime=v2-alpha-tpuv6e ;;
    v7x | tpu7x) die "$EXIT_USAGE" "v7x has no queued resources, it is reached through GKE: tpu_scripts/xpk/" ;;
    *) [[ -n "$RUNTIME_VERSION" ]] || die "$EXIT_USAGE" "--runtime-version is missing: no default is known for $KIND" ;;
  esac
  SHAPE+=("--runtime-version=${RUNTIME_VERSION:-$runtime}")
}

# capacity_arguments: CAPACITY; one kind must be chosen, because it decides the price and whether
# the pod can be taken away.
capacity_arguments() {
  CAPACITY=()
  case "${SPOT:+spot}${RESERVED:+reserved}${RESERVATION:+reservation}${ON_DEMAND:+demand}" in
    spot) CAPACITY=(--spot) ;;
    reserved) CAPACITY=(--reserved) ;;
    reservation | reservedreservation) CAPACITY=(--reserved "--reservation=$RESERVATION") ;;
    demand) ;;
    "") die "$EXIT_USAGE" "say how it is paid: --spot (cheapest, can be taken away), --reserved, --reservation NAME or --on-demand" ;;
    *) die "$EXIT_USAGE" "the settings name several of spot, reserved and on-demand; keep one" ;;
  esac
}

check_pod_options() {
  need project zone
  need_name name
  need_number node-count 1
  ((NODE_COUNT >= 1)) || die "$EXIT_USAGE" "--node-count must be at least 1"
  need_number timeout 86400
  need_number poll 30
  shape_arguments
  capacity_arguments
}

# request_pod: asks for the pod and returns; it then waits in Google's queue.
request_pod() {
  local nodes=("--node-id=$NAME")
  if ((NODE_COUNT > 1)); then
    nodes=("--node-count=$NODE_COUNT" "--node-prefix=$NAME")
  fi
  tpus create "$NAME" "${nodes[@]}" "${SHAPE[@]}" "${CAPACITY[@]}"
  if [[ -n "$RESERVATION" ]]; then
    TPUS=(gcloud alpha "${TPUS[@]:1}") # --reservation is there only
  fi
  local option variable
  for option in network subnetwork service-account labels; do
    variable="$(variable_of "$option")"
    [[ -z "${!variable}" ]] || TPUS+=("--$option=${!variable}")
  done
  [[ -z "$VALID_UNTIL" ]] || TPUS+=("--valid-until-duration=$VALID_UNTIL")
  [[ -z "$INTERNAL_IPS" ]] || TPUS+=(--internal-ips)
  gcloud_run "${TPUS[@]}" --async --quiet
}

# delete_pod: --force takes the nodes with it; a suspended request must be deleted before its name
# can be used again, and counts against the quota until then.
delete_pod() {
  tpus delete "$NAME" --force --async --quiet
  gcloud_run "${TPUS[@]}"
}

# ---- setup --------------------------------------------------------------------------------

# pin_commit: COMMIT in full, so that a later setup of the same call cannot take another one.
pin_commit() {
  local wanted="${COMMIT:-HEAD}"
  if [[ -z "$COMMIT" && -n "$(git -C "$REPO_ROOT" status --porcelain --untracked-files=no)" ]]; then
    say "$SCRIPT: changes that are not committed stay here; the pod gets the last commit"
  fi
  COMMIT="$(git -C "$REPO_ROOT" rev-parse --verify --quiet "$wanted^{commit}")" ||
    die "$EXIT_USAGE" "--commit $wanted is not a commit of $REPO_ROOT"
  [[ "${EXTRAS:-tpu}" =~ ^[a-z,]+$ ]] ||
    die "$EXIT_USAGE" "--extras takes names with commas between, not $(quote "$EXTRAS")"
}

# setup_pod: the files of one commit onto every worker, and what they need installed there. The
# commit is packed here, so that workers need no access to the repository.
setup_pod() {
  local archive unpack
  archive="${TMPDIR:-/tmp}/iv2_jax-${COMMIT:0:12}.tar.gz"
  run git -C "$REPO_ROOT" archive --format=tar.gz "--output=$archive" "$COMMIT" || return
  copy_to_workers "$archive" iv2_jax.tar.gz || return
  unpack="rm -rf ~/iv2_jax.new && mkdir ~/iv2_jax.new && tar -xzf ~/iv2_jax.tar.gz -C ~/iv2_jax.new"
  unpack+=" && echo $COMMIT >~/iv2_jax.new/COMMIT && rm -rf ~/iv2_jax && mv ~/iv2_jax.new ~/iv2_jax"
  on_workers all all "$unpack && $REMOTE install $(quote "${EXTRAS:-tpu}")" || return
  if [[ -z "$NO_CHECK" ]]; then
    on_workers all all "$REMOTE check" || return
  fi
  run rm -f "$archive"
}

# ---- runs ---------------------------------------------------------------------------------

# option_of_command NAME: the value of --NAME in COMMAND, or nothing.
option_of_command() {
  local i
  for ((i = 0; i < ${#COMMAND[@]}; i++)); do
    case "${COMMAND[i]}" in
      "--$1") printf '%s' "${COMMAND[i + 1]:-}" && return ;;
      "--$1="*) printf '%s' "${COMMAND[i]#*=}" && return ;;
    esac
  done
}

# Workers share no disk: a run's folder must be where all of them, and the next slice, see it.
check_command() {
  ((${#COMMAND[@]})) || die "$EXIT_USAGE" "the command to run is missing; give it after --, for example: -- iv2 train --config C --workdir gs://BUCKET/RUN"
  local workdir
  workdir="$(option_of_command workdir)"
  if [[ -n "$workdir" && "$workdir" != gs://* && -z "$ANY_WORKDIR" ]]; then
    die "$EXIT_USAGE" "--workdir $workdir would be on each worker's own disk and go away with the slice; give gs://BUCKET/RUN (or --any-workdir for a mount that all workers share)"
  fi
}

# start_run: the same command on every worker of every slice, in the background, with its log and
# exit code kept on the worker. JAX asks the slice's metadata for coordinator, process ids and (in
# multislice) slice ids; IV2_MULTIHOST tells iv2 to let it.
start_run() {
  local words=(start "$RUN") pair
  if [[ -n "$ENV_FILE" ]]; then
    [[ -n "$DRY_RUN" || -r "$ENV_FILE" ]] || die "$EXIT_USAGE" "cannot read --env-file $ENV_FILE"
    copy_to_workers "$ENV_FILE" ".iv2_env_$RUN" || return
  fi
  words+=(IV2_MULTIHOST=1)
  [[ -z "$COMPILE_CACHE" ]] || words+=("IV2_COMPILE_CACHE=$COMPILE_CACHE")
  for pair in "${ENVS[@]}"; do
    words+=("$pair")
  done
  on_workers all all "$REMOTE $(quote_all "${words[@]}" -- "${COMMAND[@]}")"
}

# stop_run SECONDS: SIGTERM everywhere, so that the run saves; what is left after SECONDS is killed.
stop_run() { on_workers all all "$REMOTE stop $(quote "$RUN") $1"; }

# run_status: a line `iv2-status HOST STATE CODE` a worker; fails when a worker does not answer.
run_status() {
  ssh_command all all "$REMOTE status $(quote "$RUN")"
  ask "${SSH[@]}"
}
