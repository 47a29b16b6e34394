# shellcheck shell=bash disable=SC2034,SC2153  # shared variables; options are set by `parse`
# What the scripts share: options and their defaults, dry runs, questions to gcloud, errors.
# Sourced, never run. A script sets USAGE, then calls `parse "OPTIONS IT TAKES" "$@"`.

set -euo pipefail

if ((BASH_VERSINFO[0] < 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] < 4))); then
  echo "these scripts need bash >= 4.4, this is $BASH_VERSION (macOS: brew install bash)" >&2
  exit 2
fi

SCRIPT="$(basename "$0")"
readonly SCRIPT
# Exit codes. 2, 3 and 75 are those of `iv2 train`; 124 is that of timeout(1).
readonly EXIT_FAILED=1 EXIT_USAGE=2 EXIT_NAN=3 EXIT_TIMEOUT=124

# Options that take no value; every other one does.
readonly FLAGS="spot reserved on-demand flex internal-ips no-wait yes dry-run follow help no-check
 any-workdir delete-when-done cluster-too"
# What every script takes.
readonly COMMON_OPTIONS="project zone settings dry-run help"

DRY_RUN=""
YES=""
COMMAND=()
ENVS=()

say() { printf '%s\n' "$*" >&2; }

stamp() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

# die CODE WORDS...
die() {
  local code="$1"
  shift
  say "$SCRIPT: $*"
  exit "$code"
}

# An argument as a shell reads it back: bare where it can be, in quotes where it must.
quote() {
  if [[ "$1" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
    printf '%s' "$1"
  else
    printf '%s' "${1@Q}"
  fi
}

quote_all() {
  local word line=""
  for word in "$@"; do
    line+="${line:+ }$(quote "$word")"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n "$DRY_RUN" ]]; then
    quote_all "$@"
  else
    "$@" 3>&-
  fi
}

# Like `run`, for a command whose output is wanted. A dry run prints it aside, so that the
# assignment that reads the output stays empty.
ask() {
  if [[ -n "$DRY_RUN" ]]; then
    quote_all "$@" >&3
  else
    "$@" 3>&-
  fi
}
exec 3>&1

# ---- options ------------------------------------------------------------------------------

variable_of() { printf '%s' "${1//-/_}" | tr '[:lower:]' '[:upper:]'; }

is_flag() {
  local words=" ${FLAGS//$'\n'/} "
  [[ "$words" == *" $1 "* ]]
}

# parse "option option ..." "$@": sets one variable an option (--node-count -> NODE_COUNT), from
# the command line, else from IV2_TPU_NODE_COUNT, else from the settings file. What follows `--`
# goes to COMMAND, each --env NAME=VALUE to ENVS.
parse() {
  local known=" $COMMON_OPTIONS ${1//$'\n'/} " option value given=""
  shift
  for option in $known; do
    printf -v "$(variable_of "$option")" '%s' ""
  done
  while (($#)); do
    case "$1" in
      --) shift; COMMAND=("$@"); break ;;
      -h | --help) printf '%s\n' "$USAGE"; exit 0 ;;
      --*) ;;
      *) die "$EXIT_USAGE" "unexpected argument $(quote "$1"); options start with --, the command to run follows a bare --" ;;
    esac
    option="${1#--}"
    option="${option%%=*}"
    [[ "$known" == *" $option "* ]] ||
      die "$EXIT_USAGE" "unknown option --$option; --help lists what there is"
    if is_flag "$option"; then
      [[ "$1" != *=* ]] || die "$EXIT_USAGE" "--$option takes no value"
      value=1
    elif [[ "$1" == *=* ]]; then
      value="${1#*=}"
    else
      (($# > 1)) || die "$EXIT_USAGE" "--$option needs a value"
      value="$2"
      shift
    fi
    shift
    if [[ "$option" == env ]]; then
      add_env "$value"
    else
      printf -v "$(variable_of "$option")" '%s' "$value"
      given+=" $option"
    fi
  done
  fill_defaults "$known" "$given"
}

# add_env NAME=VALUE: refuses what looks like a secret, because commands are printed and logged.
add_env() {
  [[ "$1" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "$EXIT_USAGE" "--env takes NAME=VALUE, not $(quote "${1%%=*}")"
  local name="${1%%=*}"
  if [[ "${name^^}" =~ (TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_KEY|PRIVATE_KEY|ACCESS_KEY) ]]; then
    die "$EXIT_USAGE" "--env $name looks like a secret, and commands are printed; put it into a file and give --env-file FILE"
  fi
  ENVS+=("$1")
}

# fill_defaults KNOWN GIVEN: environment and settings file for what the command line left out.
fill_defaults() {
  local known="$1" given="$2 " option name variable
  local file="${SETTINGS:-${IV2_TPU_SETTINGS:-}}"
  if [[ -z "$file" && -f tpu.env ]]; then
    file=tpu.env
  fi
  if [[ -n "$file" ]]; then
    read_settings "$file"
  fi
  for option in $known; do
    [[ "$given" != *" $option "* && " help dry-run yes settings " != *" $option "* ]] || continue
    variable="$(variable_of "$option")"
    name="IV2_TPU_$variable"
    if is_flag "$option" && [[ "${!name:-}" =~ ^(0|false|no)$ ]]; then
      continue
    fi
    if [[ -n "${!name:-}" ]]; then
      printf -v "$variable" '%s' "${!name}"
    fi
  done
  one_capacity "$given"
}

# spot, reserved and on-demand exclude each other; one on the command line outdoes the defaults.
one_capacity() {
  local kind variable chosen=()
  for kind in spot reserved reservation on-demand flex; do
    if [[ "$1" == *" $kind "* ]]; then
      chosen+=("$kind")
    fi
  done
  [[ "${#chosen[@]}" -gt 0 ]] || return 0
  for kind in spot reserved reservation on-demand flex; do
    [[ " ${chosen[*]} " == *" $kind "* ]] || printf -v "$(variable_of "$kind")" '%s' ""
  done
  case "${chosen[*]}" in
    spot | reserved | reservation | "reserved reservation" | on-demand | flex) ;;
    *) die "$EXIT_USAGE" "give one of --spot, --reserved and --on-demand, not ${chosen[*]}" ;;
  esac
}

# Lines NAME=VALUE of IV2_TPU_ variables. Read, not executed; the environment comes before it.
read_settings() {
  local line name value number=0
  [[ -r "$1" ]] || die "$EXIT_USAGE" "cannot read the settings file $1"
  while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    line="${line%$'\r'}"
    [[ -n "${line// /}" && "$line" != \#* ]] || continue
    [[ "$line" =~ ^(IV2_TPU_[A-Z_]+)=(.*)$ ]] ||
      die "$EXIT_USAGE" "$1, line $number: expected IV2_TPU_NAME=VALUE (see tpu_scripts/env.example)"
    name="${BASH_REMATCH[1]}"
    value="${BASH_REMATCH[2]}"
    if [[ "$value" =~ ^\"(.*)\"$ || "$value" =~ ^\'(.*)\'$ ]]; then
      value="${BASH_REMATCH[1]}"
    fi
    if [[ -z "${!name+set}" ]]; then
      printf -v "$name" '%s' "$value"
    fi
  done <"$1"
}

# need OPTION...: the options that must be there.
need() {
  local option variable
  for option in "$@"; do
    variable="$(variable_of "$option")"
    [[ -n "${!variable}" ]] ||
      die "$EXIT_USAGE" "--$option is missing (or set IV2_TPU_$variable, or write it to tpu.env)"
  done
}

# need_number OPTION DEFAULT: a whole number >= 0.
need_number() {
  local variable
  variable="$(variable_of "$1")"
  [[ -n "${!variable}" ]] || printf -v "$variable" '%s' "$2"
  [[ "${!variable}" =~ ^[0-9]+$ ]] || die "$EXIT_USAGE" "--$1 must be a whole number, not $(quote "${!variable}")"
}

# need_name OPTION: what Google Cloud and a folder both take.
need_name() {
  local variable
  need "$1"
  variable="$(variable_of "$1")"
  [[ "${!variable}" =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    die "$EXIT_USAGE" "--$1 $(quote "${!variable}"): use lower-case letters, digits and -, starting with a letter, at most 62"
}

# confirm QUESTION: asks on the terminal; --yes answers, no terminal and no --yes is an error.
confirm() {
  [[ -z "$DRY_RUN" && -z "$YES" ]] || return 0
  local answer=""
  if [[ ! -t 0 ]]; then
    die "$EXIT_USAGE" "$1 There is no terminal to ask on; give --yes."
  fi
  printf '%s [y/N] ' "$1" >&2
  read -r answer || true
  [[ "$answer" == y || "$answer" == yes ]] || die "$EXIT_FAILED" "nothing was done"
}

# ---- gcloud -------------------------------------------------------------------------------

# need_tools gcloud docker ...: a dry run needs none of them.
need_tools() {
  local tool
  [[ -z "$DRY_RUN" ]] || return 0
  for tool in "$@"; do
    command -v "$tool" >/dev/null && continue
    case "$tool" in
      gcloud) die "$EXIT_USAGE" "gcloud is not installed; see https://cloud.google.com/sdk/docs/install" ;;
      xpk) die "$EXIT_USAGE" "xpk is not installed: pip install xpk==1.16.0" ;;
      kubectl) die "$EXIT_USAGE" "kubectl is not installed: gcloud components install kubectl" ;;
      *) die "$EXIT_USAGE" "$tool is not installed" ;;
    esac
  done
}

# Stops when nobody is logged in: gcloud's own message comes late and from every worker.
need_login() {
  local account
  need_tools gcloud
  account="$(ask gcloud auth list --filter=status:ACTIVE '--format=value(account)')" || account=""
  [[ -n "$DRY_RUN" || -n "$account" ]] ||
    die "$EXIT_USAGE" "gcloud is not logged in: run  gcloud auth login"
}

# tpus VERB...: gcloud's queued-resources group with project and zone.
tpus() {
  local verb="$1"
  shift
  TPUS=(gcloud compute tpus queued-resources "$verb" "$@" "--project=$PROJECT" "--zone=$ZONE")
}

# The state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED, FAILED,
# ...; ABSENT when there is none; UNKNOWN, with gcloud's words on stderr, when it cannot be asked.
state_of() {
  local out errors
  tpus describe "$NAME" '--format=value(state.state)'
  if [[ -n "$DRY_RUN" ]]; then
    ask "${TPUS[@]}"
    return
  fi
  errors="$(mktemp)"
  if out="$(ask "${TPUS[@]}" 2>"$errors")"; then
    printf '%s' "${out:-UNKNOWN}"
  elif grep -qiE 'NOT_FOUND|not found' "$errors"; then
    printf ABSENT
  else
    cat "$errors" >&2
    printf UNKNOWN
  fi
  rm -f "$errors"
}

# why_failed: what Google says about a request that failed.
why_failed() {
  tpus describe "$NAME" '--format=yaml(state)'
  ask "${TPUS[@]}" >&2 || true
}

# explain FILE: a hint for the commonest refusals, after gcloud's own words in FILE.
explain() {
  if grep -qiE 'ALREADY_EXISTS|already exists' "$1"; then
    say "$SCRIPT: the name $NAME is taken; take another --name, or delete it: delete.sh --name $NAME"
  elif grep -qiE 'quota|RESOURCE_EXHAUSTED' "$1"; then
    say "$SCRIPT: over quota. Suspended and failed requests count too: list them with"
    say "  gcloud compute tpus queued-resources list --project=$PROJECT --zone=$ZONE"
    say "and delete those; else ask for quota of this chip and capacity type in $ZONE."
  elif grep -qiE 'PERMISSION_DENIED|does not have permission' "$1"; then
    say "$SCRIPT: the account may not do this in project $PROJECT; it needs roles/tpu.admin, and tpu.googleapis.com switched on"
  elif grep -qiE 'stockout|no more capacity|not enough capacity' "$1"; then
    say "$SCRIPT: no capacity in $ZONE now; it can be asked for again later, or in another --zone"
  fi
}

# gcloud_run COMMAND...: `run`, with a hint when it fails.
gcloud_run() {
  local errors code=0
  if [[ -n "$DRY_RUN" ]]; then
    run "$@"
    return
  fi
  errors="$(mktemp)"
  "$@" 2>"$errors" 3>&- || code=$?
  cat "$errors" >&2
  ((code == 0)) || explain "$errors"
  rm -f "$errors"
  return "$code"
}

# on_workers NODE WORKER COMMAND: a shell command by ssh; `all` for either runs it everywhere.
on_workers() {
  ssh_command "$1" "$2" "$3"
  run "${SSH[@]}"
}

# A node that was created anew has a new host key, so the first key seen is taken; a host that
# does not answer in 30 s, or goes silent for 2 minutes, ends the call rather than hang it.
ssh_command() {
  tpus ssh "$NAME" "--node=$1" "--worker=$2" --quiet --strict-host-key-checking=no \
    --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oServerAliveCountMax=4 "--command=$3"
  SSH=("${TPUS[@]}")
  if [[ -n "${INTERNAL_IPS:-}" ]]; then
    SSH+=(--tunnel-through-iap) # no address of its own to reach it at
  fi
}

# copy_to_workers FILE REMOTE
copy_to_workers() {
  tpus scp "$1" "$NAME:$2" --node=all --worker=all --quiet --strict-host-key-checking=no
  if [[ -n "${INTERNAL_IPS:-}" ]]; then
    TPUS+=(--tunnel-through-iap)
  fi
  run "${TPUS[@]}"
}

# wait_for_state WANTED SECONDS: polls until the request is in that state.
wait_for_state() {
  local wanted="$1" deadline=$((SECONDS + $2)) state last=""
  while :; do
    state="$(state_of)"
    [[ -z "$DRY_RUN" ]] || return 0
    if [[ "$state" != "$last" ]]; then
      stamp "$NAME: $state"
      last="$state"
    fi
    [[ "$state" != "$wanted" ]] || return 0
    if [[ "$wanted" == ACTIVE ]]; then
      case "$state" in
        FAILED | SUSPENDING | SUSPENDED)
          why_failed
          return "$EXIT_FAILED"
          ;;
        ABSENT)
          say "$SCRIPT: $NAME is gone while waiting for it"
          return "$EXIT_FAILED"
          ;;
      esac
    fi
    if ((SECONDS >= deadline)); then
      say "$SCRIPT: $NAME is $state, not $wanted, after $2 s (--timeout)"
      return "$EXIT_TIMEOUT"
    fi
    sleep "$POLL"
  done
}
