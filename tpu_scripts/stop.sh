#!/usr/bin/env bash
# Stops a run on all workers; the pod stays.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

USAGE="\
stop.sh --name NAME --run RUN [--grace SECONDS] [options]

Asks the run to save and end (SIGTERM, exit code 75); what is still there after --grace seconds
(300) is killed. The pod stays and costs money until delete.sh. Stop watch.sh first: it starts a
run that ended with 75 again.

  --project P --zone Z --name NAME   the pod
  --internal-ips              the pod has no external addresses: go through IAP
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  stop.sh --name iv2-1b --run s1"

parse "name run grace internal-ips" "$@"
need project zone
need_name name
need_name run
need_number grace 300
need_login
stop_run "$GRACE" || die "$EXIT_FAILED" "not every worker answered"
