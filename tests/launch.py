"""Start the ranks of a test as processes, over gloo, and gather what each wrote."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def start(script: str, world: int, folder: Path, *arguments: str, **env: str) -> list:
    """One process per rank of ``tests/<script>``; rank r writes ``folder/r.json``, r.out, r.err."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    common = os.environ | {
        "PYTHONPATH": path,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(world):
        with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
            processes.append(
                subprocess.Popen(
                    [sys.executable, TESTS / script, str(folder), *arguments],
                    env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | env,
                    stdout=out,
                    stderr=err,
                )
            )
    return processes


def finish(processes: list, folder: Path, timeout_s: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and stderr of all ranks; none is left behind."""
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return codes, [(folder / f"{rank}.err").read_text() for rank in range(len(processes))]


def results(script: str, world: int, folder: Path, *arguments: str) -> list[dict]:
    """What each rank found, once all have ended well."""
    codes, errors = finish(start(script, world, folder, *arguments), folder)
    assert codes == [0] * world, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def fated(kind: type) -> None:
    """End this rank before the update of ``kind`` that $KILL, ``rank:update``, names."""
    victim, _, at = os.environ.get("KILL", "").partition(":")
    update = kind.update

    def until_then(step):
        if os.environ["RANK"] == victim and step.done + 1 == int(at):
            os._exit(9)
        update(step)

    kind.update = until_then
