"""
Where SLURM puts the tasks of a step, and whether they can reach each other.

``python -m perf.place HEAD PORT FILE`` as each task: all connect to rank 0, on the node HEAD, and
rank 0 writes who came to FILE. It imports nothing but the standard library, so that a thousand
tasks are started in no time, before GPU hours are spent.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

WAIT_S = 120


def record(environment=os.environ) -> dict[str, Any]:
    """Who this task is, by SLURM's account."""
    return {
        "rank": int(environment["SLURM_PROCID"]),
        "local_rank": int(environment["SLURM_LOCALID"]),
        "world": int(environment["SLURM_NTASKS"]),
        "host": environment.get("SLURMD_NODENAME") or socket.gethostname(),
        "gpus": environment.get("CUDA_VISIBLE_DEVICES", ""),
    }


def serve(port: int, world: int, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Rank 0: wait for all the others, answer each with the number that came."""
    found, lines = [own], []
    with socket.create_server(("", port), backlog=world) as server:
        server.settimeout(WAIT_S)
        while len(found) < world:
            line, _ = server.accept()
            line.settimeout(WAIT_S)
            with line.makefile() as text:
                found.append(json.loads(text.readline()))
            lines.append(line)
        for line in lines:
            line.sendall(f"{len(found)}\n".encode())
            line.close()
    return sorted(found, key=lambda one: one["rank"])


def visit(head: str, port: int, own: dict[str, Any]) -> int:
    """Another rank: say who this is; the number of ranks that came."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            line = socket.create_connection((head, port), timeout=WAIT_S)
            break
        except ConnectionRefusedError:  # rank 0 has not begun yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    with line, line.makefile() as text:
        line.sendall(json.dumps(own).encode() + b"\n")
        return int(text.readline())


def main() -> None:
    """Meet the others."""
    head, port, target = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    own = record()
    if own["rank"] == 0:
        found = serve(port, int(str(own["world"])), own)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(target)
    elif visit(head, port, own) != own["world"]:
        sys.exit(f"rank {own['rank']}: not all came")


if __name__ == "__main__":
    main()
