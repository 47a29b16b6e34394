#!/usr/bin/env bash
# Starts a command on all workers of a pod, in the background.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

USAGE="\
launch.sh --name NAME --run RUN [options] -- COMMAND...

Starts COMMAND on every worker of every slice and returns. It goes on when you log out; its log and
its exit code stay on the workers (~/iv2_runs/RUN). watch.sh also starts it, and starts it again.

  --project P --zone Z --name NAME   the pod
  --run RUN                   a name for the run; a run of that name that is alive is an error
  --compile-cache gs://B/xla  keep compiled programs there, for all workers and the next start
  --env NAME=VALUE            environment of the command; may be repeated; never for secrets
  --env-file FILE             lines NAME=VALUE copied to the workers, never printed
  --any-workdir               --workdir need not be gs:// (a mount that all workers share)
  --internal-ips              the pod has no external addresses: go through IAP
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  launch.sh --name iv2-1b --run s1 -- iv2 train --config configs/stage1/internvideo2_1b.py \\
      --workdir gs://BUCKET/s1
  launch.sh --name iv2-1b --run s1 --env IV2_ATTENTION=xla --dry-run -- iv2 train ..."

parse "$RUN_OPTIONS" "$@"
need project zone
need_name name
need_name run
check_command
need_login
start_run || die "$EXIT_FAILED" "not every worker started the run; look with  logs.sh --name $NAME --run $RUN, stop the others with  stop.sh --name $NAME --run $RUN"
