#!/usr/bin/env bash
# Lists the runs of a GKE cluster.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=../pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/../pod.sh"
# shellcheck source=gke.sh
source "$(dirname "${BASH_SOURCE[0]}")/gke.sh"

USAGE="\
xpk/status.sh --cluster C [--run RUN] [options]

  --project P --zone Z --cluster C
  --run RUN                   only this one
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  xpk/status.sh --cluster iv2"

parse "cluster run" "$@"
need project zone
need_name cluster
need_tools xpk kubectl
need_login
WORDS=("--cluster=$CLUSTER")
[[ -z "$RUN" ]] || WORDS+=("--filter-by-job=$RUN")
xpk_run workload list "${WORDS[@]}" || die "$EXIT_FAILED" "xpk could not list the runs of $CLUSTER"
