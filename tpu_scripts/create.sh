#!/usr/bin/env bash
# Asks for a TPU pod as a queued resource and waits until it is there.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

USAGE="\
create.sh --name NAME --topology KIND:GRID (--spot | --reserved | --on-demand) [options]

Asks for TPUs as a queued resource and waits until they are there.

  --project P --zone Z        where
  --name NAME                 of the queued resource and its nodes
  --topology v5p:8x8x8        chips, as in iv2 plan (v4 v5e v5p v6e)
  --accelerator-type T        instead of --topology: Google's name, such as v5litepod-256
  --runtime-version V         image of the TPU VMs; default: the one for JAX on that chip
  --node-count N              that many slices (multislice); default 1
  --spot                      cheapest; can be taken away at any time
  --reserved                  from a reservation; --reservation NAME picks one
  --on-demand                 neither
  --valid-until 6h            give up queueing after that long
  --network, --subnetwork, --internal-ips, --service-account, --labels   handed on to gcloud
  --timeout SECONDS           of the wait (default 86400); --poll SECONDS between looks (30)
  --no-wait                   only ask
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  create.sh --name iv2-1b --topology v5e:16x16 --spot --project P --zone europe-west4-b
  create.sh --name iv2-6b --topology v5p:8x8x8 --node-count 2 --reserved --dry-run

Exit codes: 0 there, 1 refused or failed, 2 something to mend in the call, 124 not in time."

parse "$POD_OPTIONS no-wait" "$@"
((${#COMMAND[@]} == 0)) || die "$EXIT_USAGE" "create.sh runs no command; launch.sh does"
check_pod_options
need_login
request_pod || exit "$EXIT_FAILED"
if [[ -z "$NO_WAIT" ]]; then
  wait_for_state ACTIVE "$TIMEOUT" || exit
  [[ -n "$DRY_RUN" ]] || say "$NAME is there; next: setup.sh --name $NAME"
fi
