#!/usr/bin/env bash
# Deletes a run, or the whole cluster.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=../pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/../pod.sh"
# shellcheck source=gke.sh
source "$(dirname "${BASH_SOURCE[0]}")/gke.sh"

USAGE="\
xpk/delete.sh --cluster C (--run RUN | --cluster-too) [--yes] [options]

Deletes a run, or with --cluster-too the cluster with all that runs on it, after asking. What is in
gs:// stays.

  --project P --zone Z --cluster C
  --run RUN                   ends and deletes this run
  --cluster-too               deletes the cluster
  --yes                       do not ask
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  xpk/delete.sh --cluster iv2 --run s1
  xpk/delete.sh --cluster iv2 --cluster-too"

parse "cluster run cluster-too yes" "$@"
need project zone
need_name cluster
[[ -n "$RUN$CLUSTER_TOO" ]] || die "$EXIT_USAGE" "give --run RUN, or --cluster-too for the whole cluster"
need_tools xpk kubectl
need_login
if [[ -n "$RUN" ]]; then
  need_name run
  confirm "Delete the run $RUN on cluster $CLUSTER (project $PROJECT)?"
  xpk_run workload delete "--cluster=$CLUSTER" "--workload=$RUN" --force ||
    die "$EXIT_FAILED" "xpk could not delete $RUN; its messages are above"
fi
if [[ -n "$CLUSTER_TOO" ]]; then
  confirm "Delete the cluster $CLUSTER (project $PROJECT, zone $ZONE) and all that runs on it?"
  xpk_run cluster delete "--cluster=$CLUSTER" --force ||
    die "$EXIT_FAILED" "xpk could not delete $CLUSTER; its messages are above"
fi
