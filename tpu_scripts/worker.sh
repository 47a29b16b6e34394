#!/usr/bin/env bash
# Runs on a TPU VM, called by the other scripts over ssh: installs, starts, stops and looks at runs.
#
#   worker.sh install EXTRAS            virtual environment ~/iv2_venv with this repository
#   worker.sh check                     do all processes see all chips?
#   worker.sh start RUN [NAME=VALUE...] -- COMMAND...
#   worker.sh status RUN                one line: iv2-status HOST running|exited|lost|absent CODE
#   worker.sh stop RUN SECONDS          SIGTERM, then SIGKILL after SECONDS
#   worker.sh logs RUN LINES [follow]
#
# A run's folder ~/iv2_runs/RUN holds `log`, `pid` (of its process group), `command_pid` and, once
# it has ended, `exit_code`. A pid without a living process and without an exit code: the machine went down.

set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$HOME/iv2_venv"
PYTHON_VERSION=3.12 # the images of TPU VMs bring 3.10, iv2_jax needs 3.11
INSTALL_SECONDS=1800
CHECK_SECONDS=300

fail() {
  printf 'worker %s: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

install() {
  if ! command -v uv >/dev/null && [[ ! -x "$HOME/.local/bin/uv" ]]; then
    timeout "$INSTALL_SECONDS" python3 -m pip install --quiet --user uv || fail "pip could not install uv; has this VM a way to the internet (an external address or Cloud NAT)?"
  fi
  export PATH="$HOME/.local/bin:$PATH"
  [[ -x "$VENV/bin/python" ]] || uv venv --quiet --python "$PYTHON_VERSION" "$VENV" || fail "uv could not make $VENV"
  timeout "$INSTALL_SECONDS" uv pip install --quiet --python "$VENV/bin/python" -e "${REPO}[$1]" ||
    fail "installing iv2_jax[$1] failed or took over $INSTALL_SECONDS s"
  "$VENV/bin/iv2" --version
}

# Every process joins, counts the chips, and leaves; a slice that cannot form hangs, hence timeout.
check() {
  local program="
import jax
from iv2_jax.parallel.distributed import start
start()
kind = jax.devices()[0].device_kind
print(f'process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of '
      f'{jax.device_count()} devices, {kind}')
assert jax.devices()[0].platform == 'tpu', 'JAX sees no TPU'
"
  IV2_MULTIHOST=1 timeout "$CHECK_SECONDS" "$VENV/bin/python" -c "$program" ||
    fail "the TPU check failed or took over $CHECK_SECONDS s; is another program using the chips, or a worker down?"
}

# Process ids start over when the machine does.
boot_id() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }

# Whether any process of the run's group lives; one that is dead but not yet reaped does not count.
alive() {
  [[ -s "$1/pid" && "$(cat "$1/boot" 2>/dev/null)" == "$(boot_id)" ]] || return 1
  ps -eo pgid=,stat= | awk -v group="$(<"$1/pid")" \
    '$1 == group && $2 !~ /^Z/ {found = 1} END {exit !found}'
}

start() {
  local run="$1" folder="$HOME/iv2_runs/$1" environment=()
  shift
  while (($#)) && [[ "$1" != -- ]]; do
    environment+=("$1")
    shift
  done
  shift
  mkdir -p "$folder"
  if alive "$folder"; then
    fail "run $run is already going (process group $(<"$folder/pid")); stop.sh ends it"
  fi
  rm -f "$folder/exit_code" "$folder/pid"
  boot_id >"$folder/boot"
  if [[ -f "$HOME/.iv2_env_$run" ]]; then
    chmod 600 "$HOME/.iv2_env_$run"
  fi
  {
    printf '\n==== %s %s commit %s\n' "$(date -u +%FT%TZ)" "$(hostname)" "$(cat "$REPO/COMMIT" 2>/dev/null || echo unknown)"
    printf '==== %s\n' "$*"
  } >>"$folder/log"
  # A session of its own: it outlives the ssh connection, and a signal to the group reaches all of
  # it, the loader's workers too. The shell around it stays to write the exit code.
  env "${environment[@]}" IV2_RUN_FOLDER="$folder" IV2_ENV_FILE="$HOME/.iv2_env_$run" \
    PATH="$VENV/bin:$PATH" PYTHONUNBUFFERED=1 \
    setsid bash "$REPO/tpu_scripts/worker.sh" supervise "$@" </dev/null >>"$folder/log" 2>&1 &
  for _ in $(seq 50); do
    [[ ! -s "$folder/pid" ]] || break
    sleep 0.1
  done
  [[ -s "$folder/pid" ]] || fail "run $run did not start; see $folder/log"
  printf '%s: run %s started, process group %s\n' "$(hostname)" "$run" "$(<"$folder/pid")"
}

# The leader of the run's process group.
supervise() {
  local code=0 folder="$IV2_RUN_FOLDER" child interrupted=""
  if [[ -f "$IV2_ENV_FILE" ]]; then
    local line
    while IFS= read -r line || [[ -n "$line" ]]; do # read, not executed
      [[ ! "$line" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || export "${line%$'\r'}"
    done <"$IV2_ENV_FILE"
  fi
  cd "$REPO"
  # A machine that is shut down signals this shell too; it must outlive the command to write the
  # exit code. A `wait` that a signal ended is taken up again.
  trap 'interrupted=1' TERM INT HUP
  "$@" &
  child=$!
  printf '%s\n' "$child" >"$folder/command_pid"
  printf '%s\n' $$ >"$folder/pid.tmp"
  mv "$folder/pid.tmp" "$folder/pid"
  while :; do
    interrupted=""
    code=0
    wait "$child" || code=$?
    if [[ -z "$interrupted" ]] || ! kill -0 "$child" 2>/dev/null; then
      break
    fi
  done
  if ((code > 128)) && [[ -n "$interrupted" ]]; then # it ended while the signal was being handled
    code=0
    wait "$child" || code=$?
  fi
  printf '%s\n' "$code" >"$folder/exit_code.tmp"
  mv "$folder/exit_code.tmp" "$folder/exit_code"
  printf '==== %s ended with exit code %s\n' "$(date -u +%FT%TZ)" "$code"
}

status() {
  local folder="$HOME/iv2_runs/$1" state=absent code=-
  if [[ -s "$folder/exit_code" ]]; then
    state=exited
    code="$(<"$folder/exit_code")"
  elif alive "$folder"; then
    state=running
  elif [[ -s "$folder/pid" ]]; then
    state=lost
  fi
  printf 'iv2-status %s %s %s\n' "$(hostname)" "$state" "$code"
}

stop() {
  local folder="$HOME/iv2_runs/$1" deadline=$((SECONDS + $2))
  if alive "$folder"; then
    # Only the command: its data workers must live until it has saved.
    if [[ -s "$folder/exit_code" ]]; then
      deadline=$SECONDS # only leftovers of a command that has ended
    else
      kill -TERM "$(<"$folder/command_pid")" 2>/dev/null || true
    fi
    while alive "$folder" && ((SECONDS < deadline)); do
      sleep 0.2
    done
    if alive "$folder"; then
      printf '%s: run %s did not end in %s s and is killed\n' "$(hostname)" "$1" "$2"
      kill -KILL -- "-$(<"$folder/pid")" 2>/dev/null || true
      for _ in $(seq 100); do # the chips are free only when it is gone
        alive "$folder" || break
        sleep 0.1
      done
    fi
  fi
  status "$1"
}

logs() {
  local log="$HOME/iv2_runs/$1/log"
  [[ -f "$log" ]] || fail "no run $1 here"
  printf '== %s\n' "$(hostname)"
  if [[ "${3:-}" == follow ]]; then
    exec tail -n "$2" -F "$log"
  fi
  tail -n "$2" "$log"
}

case "${1:-}" in
  install | check | start | supervise | status | stop | logs) "$@" ;;
  *) fail "worker.sh is called by the other scripts; it takes install, check, start, status, stop or logs" ;;
esac
