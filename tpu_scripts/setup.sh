#!/usr/bin/env bash
# Installs this repository at a commit on all workers of a pod.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

USAGE="\
setup.sh --name NAME [--commit C] [options]

Copies one commit of this repository to every worker, installs it into ~/iv2_venv there and checks
that JAX sees all chips of all slices. Can be run again at any time, also for another commit.

  --project P --zone Z --name NAME   the pod
  --commit C                  default: HEAD. Uncommitted changes are not taken along
  --extras tpu,text           extras of setup.py to install; default tpu
  --no-check                  leave out the look at the chips
  --internal-ips              the pod has no external addresses: go through IAP
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  setup.sh --name iv2-1b
  setup.sh --name iv2-1b --commit 3a31131 --extras tpu,text --dry-run"

parse "$SETUP_OPTIONS" "$@"
((${#COMMAND[@]} == 0)) || die "$EXIT_USAGE" "setup.sh runs no command; launch.sh does"
need project zone
need_name name
pin_commit
need_login
setup_pod || die "$EXIT_FAILED" "setting up $NAME failed; the workers' messages are above"
