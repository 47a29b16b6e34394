#!/usr/bin/env bash
# Keeps a run going until it is done: starts it, starts it again, asks for a new pod when the old
# one was taken away.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/pod.sh"

USAGE="\
watch.sh --name NAME --run RUN (the options of create.sh, setup.sh and launch.sh) -- COMMAND...

Looks at the pod and the run again and again and does what is due:
  the run is not there             starts COMMAND on all workers
  exit code 75, a killed process   starts it again; it goes on from its newest checkpoint
  pod suspended, failed, a node preempted
                                   deletes the request, asks anew, sets up, starts COMMAND
  exit code 0 everywhere           ends with 0
  exit code 2 or 3                 ends with it: a human must look (2 something to mend, 3 NaN)
  pod deleted by somebody          ends with 1
Any other exit code is tried again --max-failures times in a row. Pauses double from --backoff to
--max-backoff and start over after a run of --healthy-after seconds. Run it where it can stay:
tmux on a small VM, not a laptop that sleeps.

  --project P --zone Z --name NAME --run RUN
  --topology, --spot, ...     as in create.sh: what to ask for when the pod was taken away
  --commit C, --extras E      as in setup.sh; default commit: HEAD when this starts
  --env, --env-file, --compile-cache   as in launch.sh
  --poll SECONDS              between looks; default 30
  --timeout SECONDS           for a new pod to come; default 86400
  --grace SECONDS             for the others to save and end when one has ended; default 300
  --backoff S, --max-backoff S    pauses before a restart; default 10 and 600
  --max-failures N            default 3
  --healthy-after SECONDS     default 600
  --unreachable-after SECONDS with gcloud or ssh failing: ends with 1; default 1800
  --delete-when-done          delete the pod after exit code 0
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands of each case, run nothing

examples:
  watch.sh --name iv2-1b --run s1 --topology v5e:16x16 --spot -- \\
      iv2 train --config configs/stage1/internvideo2_1b.py --workdir gs://BUCKET/s1"

OPTIONS="$POD_OPTIONS $SETUP_OPTIONS $RUN_OPTIONS grace backoff max-backoff max-failures"
parse "$OPTIONS healthy-after unreachable-after delete-when-done" "$@"
check_pod_options
need_name run
need_number grace 300
need_number backoff 10
need_number max-backoff 600
need_number max-failures 3
need_number healthy-after 600
need_number unreachable-after 1800
check_command
pin_commit

failures=0     # in a row, of the kind that may not go away by itself
pause=$BACKOFF # before the next restart
started=-1     # SECONDS when the run was last started, -1 before that
answered=0     # SECONDS when the pod last answered
seen=""        # the pod has been seen
finishing=-1   # SECONDS when the first worker was done with exit code 0

# give_up CODE WORDS...: the end of the log, then out. The pod stays for a look.
give_up() {
  local code="$1"
  shift
  stamp "$*"
  if [[ "$code" != 0 ]]; then
    on_workers 0 0 "$REMOTE logs $(quote "$RUN") 30" >&2 || true
    say "$SCRIPT: the pod is still there and costs money; delete.sh --name $NAME ends that"
  fi
  exit "$code"
}

# A run that lasted shows that the trouble before it is over.
forget_if_healthy() {
  if ((started >= 0 && SECONDS - started >= HEALTHY_AFTER)); then
    pause=$BACKOFF
    failures=0
  fi
}

# take_pause REASON: waits before the next try, longer each time unless the last run was healthy.
take_pause() {
  forget_if_healthy
  stamp "$1; next try in $pause s"
  sleep "$pause"
  pause=$((pause * 2 > MAX_BACKOFF ? MAX_BACKOFF : pause * 2))
}

# count_failure REASON: ends after too many in a row.
count_failure() {
  forget_if_healthy
  failures=$((failures + 1))
  ((failures <= MAX_FAILURES)) || give_up "$EXIT_FAILED" "$1; that is $failures times in a row, a human must look"
}

start_again() {
  started=$SECONDS
  finishing=-1
  stamp "starting $RUN on $NAME"
  start_run || count_failure "not every worker could start the run"
}

# A pod was taken away: the old request must go before the same name can be asked for again.
recreate() {
  take_pause "$NAME is $1: asking for a new one"
  delete_pod || count_failure "the old request could not be deleted"
  wait_for_state ABSENT 1800 || give_up "$EXIT_FAILED" "the old request is not gone after half an hour"
  if ! request_pod; then
    count_failure "the pod could not be asked for"
    return 0 # the next look finds it ABSENT or FAILED
  fi
  wait_for_state ACTIVE "$TIMEOUT" || {
    count_failure "the pod did not come"
    return 0
  }
  setup_pod || {
    count_failure "the new pod could not be set up"
    return 0
  }
  answered=$SECONDS
  start_again
}

# node_lost: whether a node of a pod that is said to be ACTIVE is gone all the same.
node_lost() {
  local states
  states="$(ask gcloud compute tpus tpu-vm list "--filter=name~/nodes/$NAME(-[0-9]+)?\$" \
    '--format=value(state)' "--project=$PROJECT" "--zone=$ZONE")" || return 1
  grep -qE 'PREEMPTED|TERMINATED|STOPPED|STOPPING|DELETING' <<<"$states"
}

# judge STATUS: what the workers' lines ask for.
judge() {
  local total running zero again absent codes
  total="$(grep -c '^iv2-status ' <<<"$1" || true)"
  ((total > 0)) || return 0
  running="$(grep -c '^iv2-status [^ ]* running' <<<"$1" || true)"
  absent="$(grep -c '^iv2-status [^ ]* absent' <<<"$1" || true)"
  zero="$(grep -c '^iv2-status [^ ]* exited 0$' <<<"$1" || true)"
  again="$(grep -c '^iv2-status [^ ]* exited 75$' <<<"$1" || true)"
  codes="$(awk '$1 == "iv2-status" {print ($3 == "exited") ? $4 : $3}' <<<"$1" | sort | uniq -c |
    awk '{printf "%s%s x %s", sep, $1, $2; sep = ", "}')"
  if grep -q '^iv2-status [^ ]* exited 3$' <<<"$1"; then
    finish_others "$EXIT_NAN" "the loss is not finite (exit code 3)"
  elif grep -q '^iv2-status [^ ]* exited 2$' <<<"$1"; then
    finish_others "$EXIT_USAGE" "something is to be mended (exit code 2)"
  elif ((zero == total)); then
    [[ -z "$DELETE_WHEN_DONE" ]] || delete_pod || say "$SCRIPT: $NAME could not be deleted; do it by hand"
    give_up 0 "$RUN is done"
  elif ((running == total)); then
    return 0
  elif ((absent == total)); then
    start_again
  elif ((running + zero == total)); then # some are done, the others about to be
    ((finishing >= 0)) || finishing=$SECONDS
    ((SECONDS - finishing > GRACE)) || return 0
    restart "some workers are done, others hang ($codes)" failure
  elif ((again > 0 && again + zero + running == total)); then
    restart "stopped with a checkpoint ($codes)" ""
  else
    restart "workers ended: $codes" failure
  fi
}

# finish_others CODE WORDS: one worker has ended for good, the rest would wait for it forever.
finish_others() {
  stop_run "$GRACE" >&2 || true
  give_up "$1" "$2"
}

# restart REASON KIND: everything down, a pause, everything up.
restart() {
  stop_run "$GRACE" >&2 || true
  if [[ -n "$2" ]]; then
    count_failure "$1"
  fi
  take_pause "$1"
  start_again
}

look() {
  local state status
  state="$(state_of)"
  case "$state" in
    ACTIVE)
      seen=1
      if status="$(run_status)"; then
        answered=$SECONDS
        judge "$status"
      elif node_lost; then
        recreate "ACTIVE with a node preempted"
      fi
      ;;
    FAILED | SUSPENDING | SUSPENDED)
      seen=1
      answered=$SECONDS
      [[ "$state" != FAILED ]] || why_failed
      recreate "$state"
      ;;
    ABSENT)
      ((failures == 0)) || { recreate "$state" && return 0; }
      [[ -n "$seen" ]] || die "$EXIT_USAGE" "there is no queued resource $NAME; create.sh asks for one"
      die "$EXIT_FAILED" "$NAME was deleted by somebody else; nothing is asked for anew"
      ;;
    UNKNOWN) ;; # gcloud did not answer
    *) # in the queue, or coming up
      seen=1
      answered=$SECONDS
      ;;
  esac
  if ((SECONDS - answered > UNREACHABLE_AFTER)); then
    die "$EXIT_FAILED" "$NAME has not answered for $UNREACHABLE_AFTER s (state $state); the run may still be going"
  fi
}

# The commands of each case, in the order in which a real run gives them.
show() {
  echo "# every $POLL s"
  state_of
  run_status
  echo "# the run is not there"
  start_run
  echo "# exit code 75, or a worker ended otherwise"
  stop_run "$GRACE"
  start_run
  echo "# ssh fails: is a node gone?"
  node_lost || true
  echo "# the pod was taken away"
  delete_pod
  state_of
  request_pod
  state_of
  setup_pod
  start_run
  echo "# exit code 2 or 3"
  stop_run "$GRACE"
  on_workers 0 0 "$REMOTE logs $(quote "$RUN") 30"
}

need_login
if [[ -n "$DRY_RUN" ]]; then
  show
  exit 0
fi
stamp "watching $RUN on $NAME; a new pod would get commit ${COMMIT:0:12}"
while :; do
  look
  sleep "$POLL"
done
