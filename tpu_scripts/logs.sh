#!/usr/bin/env bash
# Shows the log of a run from one worker or all.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

USAGE="\
logs.sh --name NAME --run RUN [--node N|all] [--worker N|all] [options]

  --project P --zone Z --name NAME   the pod
  --node N, --worker N        slice and worker in it, or all; default 0 and 0
  --tail N                    last lines of each; default 50
  --follow                    go on as the log grows (one worker; Ctrl-C ends it)
  --internal-ips              the pod has no external addresses: go through IAP
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  logs.sh --name iv2-1b --run s1 --follow
  logs.sh --name iv2-1b --run s1 --worker all --node all --tail 5"

parse "name run node worker tail follow internal-ips" "$@"
need project zone
need_name name
need_name run
need_number tail 50
NODE="${NODE:-0}"
WORKER="${WORKER:-0}"
[[ "$NODE" =~ ^([0-9]+|all)$ ]] || die "$EXIT_USAGE" "--node takes a number or all, not $(quote "$NODE")"
[[ "$WORKER" =~ ^([0-9]+|all)$ ]] || die "$EXIT_USAGE" "--worker takes a number or all, not $(quote "$WORKER")"
if [[ -n "$FOLLOW" && "$NODE$WORKER" == *all* ]]; then
  die "$EXIT_USAGE" "--follow is for one worker: give --node N --worker N"
fi
need_login
on_workers "$NODE" "$WORKER" "$REMOTE logs $(quote "$RUN") $TAIL${FOLLOW:+ follow}" ||
  die "$EXIT_FAILED" "no log: is $NAME up, and $RUN a run there? (status.sh --name $NAME --run $RUN)"
