"""A laptop with a stand-in for gcloud and the like: runs the scripts, keeps what they called."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
TOOLS = ("gcloud", "xpk", "kubectl", "docker")
POD = ("--name", "pod", "--project", "p", "--zone", "eu-4-b")


class Cloud:
    """One test's stand-in, its rules and its record.

    The scripts are run from a copy in a git repository of its own, because they pack commits.
    """

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "rules").mkdir()
        (folder / "tmp").mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(Path(__file__).with_name("stand_in.sh"))
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "STAND_IN": str(folder),
        }
        self.rule("auth list", "me@example.com")

    def rule(self, pattern: str, *replies: str | tuple[int, str]) -> None:
        """Replies to calls that contain `pattern`: standard output, or (exit code, error)."""
        rules = self.folder / "rules"
        rule = rules / f"{99 - len(list(rules.iterdir())):02d}"  # later rules come first
        rule.mkdir()
        (rule / "pattern").write_text(pattern)
        for n, reply in enumerate(replies, 1):
            code, error, out = (0, "", reply) if isinstance(reply, str) else (*reply, "")
            (rule / f"{n}.code").write_text(str(code))
            (rule / f"{n}.err").write_text(error)
            (rule / f"{n}.out").write_text(out)

    def workers(self, count: int) -> list[Path]:
        """Folders in which ssh commands are really run, with the repository in place."""
        homes = [self.folder / "workers" / str(n) for n in range(count)]
        for home in homes:
            home.mkdir(parents=True)
            (home / "iv2_jax").symlink_to(self.repository)
        return homes

    def run(self, script: str, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Runs a script to its end, without a terminal."""
        return subprocess.run(
            [str(self.repository / "tpu_scripts" / script), *words],
            env=self.environment | settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
        )

    def calls(self) -> list[list[str]]:
        """What was called since the last time, and forgets it; repeats in a row count once."""
        record = self.folder / "calls"
        if not record.exists():
            return []
        calls = [call.split("\x1f") for call in record.read_text().split("\x1e")[:-1]]
        record.unlink()
        return without_repeats(calls)


def without_repeats(calls: list[list[str]]) -> list[list[str]]:
    """Polling repeats a call; how often is a matter of time."""
    return [call for n, call in enumerate(calls) if n == 0 or call != calls[n - 1]]


def printed(text: str) -> list[list[str]]:
    """The commands of a dry run as a shell reads them, those of the stand-in only."""
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return without_repeats([line for line in lines if line and line[0] in TOOLS])


def make_repository(folder: Path) -> Path:
    """A git repository that holds the scripts, in one commit."""
    shutil.copytree(SCRIPTS, folder / "tpu_scripts")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "scripts"]):
        subprocess.run([*git, *words], check=True)
    return folder
