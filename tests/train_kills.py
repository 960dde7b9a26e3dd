"""Runs the trainer to its end, then again with kills at random moments. Its own process, for test_train_kills.py.

    python train_kills.py WHOLE CUT KILLS OPTION...

The children are forks of a process that has imported everything and computed nothing, so that each starts in
milliseconds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from fasttricks.train import cli, command


def start(arguments: list[str]) -> int:
    """Forks a process that runs the trainer; returns its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os._exit(cli.main(["train", *arguments]))


def ended(pid: int) -> bool:
    """Whether the process has ended by itself; it must have succeeded."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        assert os.waitstatus_to_exitcode(status) == 0, status
    return bool(found)


class Watch:
    """What a run has written so far."""

    def __init__(self, out: Path):
        self.out = out
        self.saves, self.last = 0, self._identity()

    def _identity(self) -> tuple[int, int]:
        try:
            found = (self.out / "last.pt").stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def look(self) -> None:
        """Counts the checkpoints that were written since."""
        now = self._identity()
        self.saves += now != self.last
        self.last = now

    def writes(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.out / f".{name}.new").exists() for name in ("last.pt", "best.pt"))


def wait(out: Path, pid: int, seconds: float, saves: int, writing: bool) -> tuple[bool, bool]:
    """Waits until some time has passed or so many checkpoints were written, then until one is being written.

    Returns:
        Whether the process is alive, and whether it writes a checkpoint.
    """
    watch, end = Watch(out), time.monotonic() + seconds
    while not ended(pid):
        watch.look()
        if watch.saves >= saves or time.monotonic() > end:
            if not writing or watch.writes():
                return True, watch.writes()
        else:
            time.sleep(2e-4)
    return False, False


def main(whole: Path, cut: Path, kills: int, options: list[str]) -> None:
    assert command  # imported here, not in each child
    began = time.monotonic()
    pid = start([*options, "--out", str(whole)])
    while not (whole / "last.pt").exists():
        time.sleep(1e-3)
    start_up = time.monotonic() - began
    os.waitpid(pid, 0)
    done = within = 0
    while done < kills:
        pid = start([*options, "--out", str(cut), *(["--resume"] if (cut / "config.yaml").exists() else [])])
        # a quarter of the kills falls within the start
        seconds = random.uniform(0, start_up) if random.random() < 0.25 else float("inf")
        alive, writes = wait(cut, pid, seconds, random.randrange(1, 3), random.random() < 0.5)
        if not alive:
            break
        if not writes:
            time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        within += writes
    os.waitpid(start([*options, "--out", str(cut), "--resume"]), 0)
    print(f"{done} kills, {within} of them while a checkpoint was written")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
