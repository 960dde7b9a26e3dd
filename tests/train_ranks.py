"""Runs the trainer on several ranks, as torchrun would. Its own process, for test_train_distributed.py.

    python train_ranks.py RANKS '[["--data", ...], ...]'

The ranks are forks of a process that has imported everything, so that each run starts in milliseconds.
"""

from __future__ import annotations

import json
import os
import socket
import sys

from fasttricks.train import cli, command


def run(ranks: int, options: list[str]) -> list[int]:
    """Runs the trainer; returns the exit status of each rank."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    sys.stdout.flush()
    processes = []
    for rank in range(ranks):
        if pid := os.fork():
            processes.append(pid)
            continue
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in where.items()}, WORLD_SIZE=str(ranks))
        status = cli.main(["train", *options])
        sys.stdout.flush()
        os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]


if __name__ == "__main__":
    assert command  # imported here, not in each rank
    for options in json.loads(sys.argv[2]):
        print("exit statuses", run(int(sys.argv[1]), options), flush=True)
