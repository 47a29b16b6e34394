"""Watching: what each state of pod and run leads to; real processes on two pretended workers."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import POD, Cloud, printed

COMMAND = ("--", "iv2", "train", "--workdir", "gs://b/run", "--config.a='b c'")
POD_AND_RUN = (*POD, "--run", "r", "--topology", "v5e:16x16", "--spot", "--node-count", "2")
QUICK = ("--poll", "0", "--backoff", "0", "--grace", "5")
RUNNING = "iv2-status a running -\niv2-status b running -\n"
GONE = (1, "NOT_FOUND")


def ended(first: object, second: object) -> str:
    """Status lines of two workers that ended with these exit codes."""
    return f"iv2-status a exited {first}\niv2-status b exited {second}\n"


def short(calls: list[list[str]]) -> list[str]:
    """A word a call: the verb of gcloud, and of worker.sh in an ssh call."""
    words = []
    for call in calls:
        command = next((word for word in call if word.startswith("--command=")), "")
        verb = command.rpartition("worker.sh ")[2].split(" ")[0]
        words.append(verb or (call[4] if call[3] in ("queued-resources", "tpu-vm") else call[1]))
    return words


def watch(cloud: Cloud, *words: str) -> subprocess.CompletedProcess[str]:
    return cloud.run("watch.sh", *POD_AND_RUN, *QUICK, *words, *COMMAND)


def test_started_once_and_done(cloud: Cloud) -> None:
    cloud.rule("describe", "WAITING_FOR_RESOURCES", "ACTIVE")
    absent = "iv2-status a absent -\niv2-status b absent -\n"
    cloud.rule("worker.sh status", absent, RUNNING, ended(0, 0))
    result = watch(cloud)
    assert result.returncode == 0, result.stderr
    calls = short(cloud.calls())
    assert calls.count("start") == 1
    assert "stop" not in calls
    assert "delete" not in calls


def test_a_stop_with_checkpoint_is_started_again(cloud: Cloud) -> None:
    cloud.rule("describe", "ACTIVE")
    cloud.rule("worker.sh status", RUNNING, ended(75, 75), RUNNING, ended(75, 0), ended(0, 0))
    # With no failure allowed: 75 is none.
    result = watch(cloud, "--max-failures", "0")
    assert result.returncode == 0, result.stderr
    calls = cloud.calls()
    starts = [call for call in calls if "worker.sh start" in str(call)]
    assert len(starts) == 2
    assert starts[0] == starts[1]
    order = [word for word in short(calls) if word in ("stop", "start")]
    assert order == ["stop", "start"] * 2


@pytest.mark.parametrize("code", [2, 3])
def test_codes_for_a_human(cloud: Cloud, code: int) -> None:
    cloud.rule("describe", "ACTIVE")
    cloud.rule("worker.sh status", RUNNING, f"iv2-status a exited {code}\niv2-status b running -")
    cloud.rule("worker.sh logs", "the end of the log")
    result = watch(cloud)
    assert result.returncode == code
    assert "the end of the log" in result.stderr
    assert "costs money" in result.stderr
    calls = short(cloud.calls())
    assert calls[-2:] == ["stop", "logs"], "the others are stopped"
    assert "start" not in calls


@pytest.mark.parametrize("status", [ended(1, 134), "iv2-status a lost -\niv2-status b running -"])
def test_failures_end_after_so_many(cloud: Cloud, status: str) -> None:
    cloud.rule("describe", "ACTIVE")
    cloud.rule("worker.sh status", status)
    result = watch(cloud, "--max-failures", "2")
    assert result.returncode == 1
    assert "3 times in a row" in result.stderr
    assert short(cloud.calls()).count("start") == 2


@pytest.mark.parametrize("sign", ["SUSPENDED", "FAILED", "preempted node"])
def test_a_pod_taken_away_is_asked_for_again(cloud: Cloud, sign: str) -> None:
    """All of it as in the dry run, in the same order."""
    taken = "ACTIVE" if sign == "preempted node" else sign
    reason = ["state: FAILED"] if sign == "FAILED" else []
    cloud.rule("describe", "ACTIVE", taken, *reason, GONE, "PROVISIONING", "ACTIVE")
    unreachable = [(255, "ssh: no route to host")] if taken == "ACTIVE" else []
    cloud.rule("worker.sh status", RUNNING, *unreachable, ended(0, 0))
    cloud.rule("tpu-vm list", "READY\nPREEMPTED\n")
    result = watch(cloud)
    assert result.returncode == 0, result.stderr
    calls = cloud.calls()
    words = short(calls)
    again = words[words.index("delete") :]
    expected = ["delete", "describe", "create", "describe", "scp", "install", "check", "start"]
    assert again[: len(expected)] == expected
    dry = cloud.run("watch.sh", *POD_AND_RUN, *QUICK, "--dry-run", *COMMAND)
    shown = printed(dry.stdout)
    assert [c for c in calls if c not in shown and "--format=yaml(state)" not in c] == []
    start = shown.index(calls[words.index("delete")])
    assert shown[start : start + len(expected)] == calls[words.index("delete") :][: len(expected)]


def test_a_deleted_pod_is_left_alone(cloud: Cloud) -> None:
    cloud.rule("describe", "ACTIVE", GONE)
    cloud.rule("worker.sh status", RUNNING)
    result = watch(cloud)
    assert (result.returncode, "deleted by somebody else" in result.stderr) == (1, True)
    assert "create" not in short(cloud.calls())
    result = watch(cloud)
    assert (result.returncode, "create.sh asks for one" in result.stderr) == (2, True)


def test_quota_on_the_way_back(cloud: Cloud) -> None:
    cloud.rule("describe", "SUSPENDED", GONE)
    cloud.rule("queued-resources create", (1, "Quota limit exceeded"))
    result = watch(cloud, "--max-failures", "1")
    assert result.returncode == 1
    assert "over quota" in result.stderr
    assert short(cloud.calls()).count("create") == 2


def test_unreachable_in_the_end(cloud: Cloud) -> None:
    cloud.rule("describe", (1, "ERROR: Reauthentication failed"))
    result = watch(cloud, "--unreachable-after", "1")
    assert result.returncode == 1
    assert "Reauthentication failed" in result.stderr
    assert "has not answered for 1 s" in result.stderr


def test_delete_when_done(cloud: Cloud) -> None:
    cloud.rule("describe", "ACTIVE")
    cloud.rule("worker.sh status", ended(0, 0))
    assert watch(cloud, "--delete-when-done").returncode == 0
    assert short(cloud.calls())[-1] == "delete"


on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="worker.sh runs on TPU VMs, which are Linux"
)
FAKE_UV = """#!/bin/sh
[ "$1" = venv ] && mkdir -p "$5/bin" && cp "$0" "$5/bin/iv2" && touch "$5/bin/python" \
  && chmod +x "$5/bin/python"
exit 0
"""
# Ends with 75 the first two times, then with 0; the second time only when it is told to stop.
FAKE_IV2 = """#!/bin/sh
echo "$@ in $PWD multihost $IV2_MULTIHOST secret $SECRET" >> "$HOME/starts"
n=$(wc -l < "$HOME/starts")
if [ "$n" = 1 ]; then exit 75; fi
if [ "$n" = 2 ]; then trap 'exit 75' TERM; while :; do sleep 0.1; done; fi
exit 0
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@on_linux
def test_real_processes(cloud: Cloud, tmp_path: Path) -> None:
    """Setup, launch, a stop from outside, restarts by watch, logs: worker.sh really runs."""
    homes = cloud.workers(2)
    cloud.rule("describe", "ACTIVE")
    executable(cloud.bin / "uv", FAKE_UV)
    result = cloud.run("setup.sh", *POD, "--no-check")
    assert result.returncode == 0, result.stderr
    for home in homes:
        commit = (home / "iv2_jax" / "COMMIT").read_text().strip()
        assert len(commit) == 40
        executable(home / "iv2_venv" / "bin" / "iv2", FAKE_IV2)

    (tmp_path / "secrets").write_text("# not a command: $(touch here)\nSECRET=hush  $HOME\n")
    watching = subprocess.Popen(
        [
            str(cloud.repository / "tpu_scripts" / "watch.sh"),
            *[*POD_AND_RUN, *QUICK, "--env-file", str(tmp_path / "secrets"), *COMMAND],
        ],
        env=cloud.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 30
        while any(not _lines(home / "starts", 2) for home in homes):
            assert time.monotonic() < deadline, "the runs were not started a second time"
            time.sleep(0.05)
        again = cloud.run("launch.sh", *POD, "--run", "r", *COMMAND)
        assert again.returncode == 1
        assert "already going" in again.stderr
        stopped = cloud.run("stop.sh", *POD, "--run", "r", "--grace", "10")
        assert stopped.stdout.count(" exited 75") == 2
        _, errors = watching.communicate(timeout=30)
    finally:
        if watching.poll() is None:
            watching.send_signal(signal.SIGKILL)
            watching.communicate()
        cloud.run("stop.sh", *POD, "--run", "r", "--grace", "0")
    assert watching.returncode == 0, errors
    given = "train --workdir gs://b/run --config.a='b c'"
    line = given + " in {}/iv2_jax multihost 1 secret hush  $HOME\n"
    for home in homes:
        assert (home / "starts").read_text() == line.format(home) * 3
    logs = cloud.run("logs.sh", *POD, "--run", "r", "--worker", "all", "--node", "all")
    assert logs.stdout.count("ended with exit code 0") == 2
    assert "hush" not in logs.stdout + errors


def _lines(path: Path, count: int) -> bool:
    return path.exists() and len(path.read_text().splitlines()) >= count


@on_linux
def test_a_killed_run_is_lost(cloud: Cloud) -> None:
    (home,) = cloud.workers(1)
    executable(home / "forever", "#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 0.1; done\n")
    words = [*POD, "--run", "r"]
    cloud.rule("describe", "ACTIVE")
    assert cloud.run("launch.sh", *words, "--", str(home / "forever")).returncode == 0
    assert " running -" in cloud.run("status.sh", *words).stdout
    killed = cloud.run("stop.sh", *words, "--grace", "0")
    assert "is killed" in killed.stdout
    assert " lost -" in cloud.run("status.sh", *words).stdout
