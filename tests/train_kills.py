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


def wait_for_a_draft(out: Path, pid: int, seconds: float) -> bool:
    """Waits until a checkpoint is being written, after some time; returns whether the process is alive."""
    time.sleep(seconds)
    while not ended(pid):
        if (out / ".last.pt.new").exists() or (out / ".best.pt.new").exists():
            return True
    return False


def main(whole: Path, cut: Path, kills: int, options: list[str]) -> None:
    assert command  # imported here, not in each child
    began = time.monotonic()
    pid = start([*options, "--out", str(whole)])
    while not (whole / "log.csv").exists():
        time.sleep(1e-3)
    start_up = time.monotonic() - began
    os.waitpid(pid, 0)
    training = time.monotonic() - began - start_up
    done = within = 0
    while done < kills:
        pid = start([*options, "--out", str(cut), *(["--resume"] if (cut / "config.yaml").exists() else [])])
        seconds = random.uniform(0, start_up + training / kills)
        if random.random() < 0.5:
            alive = wait_for_a_draft(cut, pid, seconds)
            within += alive
        else:
            time.sleep(seconds)
            alive = not ended(pid)
        if not alive:
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
    os.waitpid(start([*options, "--out", str(cut), "--resume"]), 0)
    print(f"{done} kills, {within} of them while a checkpoint was written")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
