#!/usr/bin/env bash
# Shows the log of a run on a GKE cluster.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=../pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/../pod.sh"
# shellcheck source=gke.sh
source "$(dirname "${BASH_SOURCE[0]}")/gke.sh"

USAGE="\
xpk/logs.sh --cluster C --run RUN [--worker N|all] [options]

  --project P --zone Z --cluster C --run RUN
  --worker N                  of each slice, or all; default 0
  --tail N                    last lines of each; default 50
  --follow                    go on as the log grows
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  xpk/logs.sh --cluster iv2 --run s1 --follow"

parse "cluster run worker tail follow" "$@"
need project zone
need_name cluster
need_name run
need_number tail 50
WORKER="${WORKER:-0}"
[[ "$WORKER" =~ ^([0-9]+|all)$ ]] || die "$EXIT_USAGE" "--worker takes a number or all, not $(quote "$WORKER")"
need_tools kubectl
need_login
SELECTOR="jobset.sigs.k8s.io/jobset-name=$RUN"
if [[ "$WORKER" != all ]]; then
  SELECTOR+=",batch.kubernetes.io/job-completion-index=$WORKER"
fi
# xpk makes regional clusters: europe-west4-b -> europe-west4
run gcloud container clusters get-credentials "$CLUSTER" "--region=${ZONE%-*}" "--project=$PROJECT" --quiet ||
  die "$EXIT_FAILED" "no cluster $CLUSTER in ${ZONE%-*}"
run kubectl logs "--selector=$SELECTOR" --all-containers --prefix --max-log-requests=256 \
  "--tail=$TAIL" ${FOLLOW:+--follow} || die "$EXIT_FAILED" "no logs of $RUN; is it there? xpk/status.sh --cluster $CLUSTER"
