#!/usr/bin/env bash
# Shows the state of a pod and of a run on it.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

USAGE="\
status.sh --name NAME [--run RUN] [options]

Prints the state of the queued resource; with --run also a line a worker:
iv2-status HOST running|exited|lost|absent EXIT_CODE.

  --project P --zone Z --name NAME   the pod
  --internal-ips              the pod has no external addresses: go through IAP
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  status.sh --name iv2-1b --run s1"

parse "name run internal-ips" "$@"
need project zone
need_name name
need_login
state="$(state_of)"
[[ -n "$DRY_RUN" ]] || echo "$NAME: $state"
if [[ -n "$RUN" && ( -n "$DRY_RUN" || "$state" == ACTIVE ) ]]; then
  need_name run
  run_status || die "$EXIT_FAILED" "not every worker answered"
fi
