#!/usr/bin/env bash
# Deletes a pod. What a run has saved in gs:// stays.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

USAGE="\
delete.sh --name NAME [--yes] [options]

Deletes the queued resource and its TPU VMs, with everything on their disks (logs too), after
asking. What is in gs:// stays. Stop a watch.sh of that pod too.

  --project P --zone Z --name NAME   the pod
  --yes                       do not ask
  --no-wait                   do not wait until it is gone
  --timeout SECONDS           of the wait (default 1800); --poll SECONDS between looks (10)
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  delete.sh --name iv2-1b
  delete.sh --name iv2-1b --yes --no-wait"

parse "name yes no-wait timeout poll" "$@"
need project zone
need_name name
need_number timeout 1800
need_number poll 10
need_login
state="$(state_of)"
if [[ "$state" == ABSENT ]]; then
  die "$EXIT_FAILED" "there is no queued resource $NAME in project $PROJECT, zone $ZONE"
fi
confirm "Delete $NAME ($state) in project $PROJECT, zone $ZONE, with its TPU VMs and their disks?"
delete_pod || exit "$EXIT_FAILED"
if [[ -z "$NO_WAIT" ]]; then
  wait_for_state ABSENT "$TIMEOUT" || exit
fi
