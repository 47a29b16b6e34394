#!/usr/bin/env bash
# Stands in for gcloud, xpk, kubectl and docker: linked under those names, first on PATH. Writes
# down its arguments and answers by rules. Nothing of Google Cloud is imitated beyond that, but for
# one thing: an ssh command is really run, once for each folder in $STAND_IN/workers, as its HOME.
#
# A rule is a folder $STAND_IN/rules/N with `pattern` (anywhere in the command line) and replies
# 1, 2, ...: N.out, N.err, N.code; the last one is given from then on.

name="${0##*/}"
{
  printf '%s' "$name"
  printf '\x1f%s' "$@"
  printf '\x1e'
} >>"$STAND_IN/calls"

for rule in "$STAND_IN"/rules/*; do
  [[ -d "$rule" && "$name $*" == *"$(<"$rule/pattern")"* ]] || continue
  count=$(($(cat "$rule/count" 2>/dev/null || echo 0) + 1))
  [[ -f "$rule/$count.code" ]] || count=$((count - 1))
  echo "$count" >"$rule/count"
  cat "$rule/$count.err" >&2
  cat "$rule/$count.out"
  exit "$(<"$rule/$count.code")"
done

worst=0
case "$name $*" in
  *"queued-resources ssh "*)
    for argument in "$@"; do
      [[ "$argument" != --command=* ]] || command="${argument#--command=}"
    done
    for home in "$STAND_IN"/workers/*; do
      [[ -d "$home" ]] || continue
      HOME="$home" TMPDIR="$home" bash -c "$command" || worst=$?
    done
    ;;
  *"queued-resources scp "*)
    for home in "$STAND_IN"/workers/*; do
      [[ ! -d "$home" ]] || cp "$5" "$home/${6#*:}"
    done
    ;;
esac
exit "$worst"
