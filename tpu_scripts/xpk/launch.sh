#!/usr/bin/env bash
# Starts a run on a GKE cluster; GKE starts it again when it asks for it.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=../pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/../pod.sh"
# shellcheck source=gke.sh
source "$(dirname "${BASH_SOURCE[0]}")/gke.sh"

USAGE="\
xpk/launch.sh --cluster C --run RUN --image I:TAG --topology KIND:GRID [options] -- COMMAND...

Submits COMMAND as a workload: one pod a worker, on all slices. Exit code 75 and taken-away slices
start all pods again, up to --max-restarts times; any other code but 0 ends it. So there is no
watch.sh here.

  --project P --zone Z --cluster C
  --run RUN                   name of the workload
  --image I:TAG               what build_image.sh printed
  --topology, --node-count    as in create_cluster.sh
  --spot, --on-demand, --flex, --reservation R   capacity, for clusters with autoprovisioning
  --max-restarts N            default 100
  --grace SECONDS             between SIGTERM and SIGKILL; default 300
  --compile-cache gs://B/xla  keep compiled programs there
  --env NAME=VALUE            environment of the command; may be repeated; never for secrets
  --env-file FILE             lines NAME=VALUE, never printed
  --any-workdir               --workdir need not be gs://
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  xpk/launch.sh --cluster iv2 --run s1 --image I:3a311310d991 --topology v6e:16x16 -- \\
      iv2 train --config configs/stage1/internvideo2_1b.py --workdir gs://BUCKET/s1"

OPTIONS="cluster run image topology node-count spot reservation on-demand flex max-restarts grace"
parse "$OPTIONS compile-cache env env-file any-workdir" "$@"
need project zone image
need_name cluster
need_name run
need_number node-count 1
need_number max-restarts 100
need_number grace 300
[[ "${IMAGE##*/}" == *:* ]] || die "$EXIT_USAGE" "--image $IMAGE has no tag; give what build_image.sh printed"
xpk_type
check_command
CAPACITY=()
if [[ -n "$SPOT$RESERVATION$ON_DEMAND$FLEX" ]]; then
  gke_capacity
fi
need_tools xpk kubectl
need_login
WORDS=("--cluster=$CLUSTER" "--workload=$RUN" "--docker-image=$IMAGE" "--tpu-type=$TYPE"
  "--num-slices=$NODE_COUNT" "${CAPACITY[@]}" "--max-restarts=$MAX_RESTARTS"
  --restart-on-exit-codes=75 "--termination-grace-period-seconds=$GRACE")
ENVS=(IV2_MULTIHOST=1 "${ENVS[@]}")
[[ -z "$COMPILE_CACHE" ]] || ENVS+=("IV2_COMPILE_CACHE=$COMPILE_CACHE")
for pair in "${ENVS[@]}"; do
  WORDS+=("--env=$pair")
done
if [[ -n "$ENV_FILE" ]]; then
  [[ -n "$DRY_RUN" || -r "$ENV_FILE" ]] || die "$EXIT_USAGE" "cannot read --env-file $ENV_FILE"
  WORDS+=("--env-file=$ENV_FILE")
fi
# `exec`: the signal to end must reach the command, not a shell around it.
xpk_run workload create "${WORDS[@]}" "--command=exec $(quote_all "${COMMAND[@]}")" ||
  die "$EXIT_FAILED" "xpk could not start $RUN; its messages are above"
