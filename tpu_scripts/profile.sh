#!/usr/bin/env bash
# Fetches the profiles that a run has written.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE="\
profile.sh --workdir gs://BUCKET/RUN --to FOLDER [options]

Copies the traces that  iv2 train --profile STEPS  wrote into WORKDIR/profile, and says how to look
at them. Only what is not there yet is fetched.

  --workdir W                 the run's workdir
  --to FOLDER                 where to, on this machine
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  launch.sh --name iv2-1b --run prof -- iv2 train --config C --workdir gs://B/prof --profile 20:23
  profile.sh --workdir gs://B/prof --to profiles/prof"

parse "workdir to" "$@"
need workdir to
[[ "$WORKDIR" == gs://* ]] || die "$EXIT_USAGE" "--workdir $WORKDIR is not gs://; profiles of another folder are in its profile/"
need_login
run mkdir -p "$TO"
run gcloud storage rsync --recursive "${WORKDIR%/}/profile" "$TO" ||
  die "$EXIT_FAILED" "nothing fetched from ${WORKDIR%/}/profile; was the run started with --profile STEPS, and has it passed them?"
[[ -n "$DRY_RUN" ]] || say "look at it:  pip install xprof && xprof --logdir $(quote "$TO")"
