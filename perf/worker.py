"""
One rank of a measurement: ``python -m perf.worker SPEC.json``, started by torchrun, srun or alone.

Every rank times the same rounds, a fixed number of them: a count that each rank chose from its own
clock would leave the others waiting. A step's time is the largest of all ranks. SGD, once reduced,
and the method run in turn, as in ``perf.protocol``. Rank 0 writes the result after each setting, so
that a crash loses one.

Of a step are reported: ``wait_s``, what the mean rank waits for the slowest before the reduction;
``comm_s``, all-reduces of the same bytes alone, with all ranks there; ``update_s``, from the last
arrival to the end.
"""

import gc
import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dpsgd import keep_freed_memory
from perf import device as devices
from perf import fabric as fabrics
from perf.outcome import WrongResult, outcome
from perf.plan import Setting
from perf.protocol import interval, ratios, timed
from perf.share import DRAWS, Share

PART_ROUNDS = 2 * DRAWS


def measure(setting: Setting, fabric: Any, device: str, rounds: int, sgd: Any) -> tuple[dict, Any]:
    """
    (what was found, the built :class:`perf.share.Share`), the same on each rank.

    Raises:
        WrongResult: the ranks' parameters differ, or are not finite, or a step recompiled.
    """
    found: dict[str, Any] = {}
    row = setting.case.row
    subject, failed = None, ("", "")
    try:  # what can fail on one rank alone must not leave the others in a collective
        subject = Share(setting, fabric.ranks, device)
        if setting.sync == "once":
            found["first_step_s"] = timed(lambda: subject.accumulate(0, wait=True))
    except Exception as error:
        failed = outcome(error, peer=not row.ours)
    if fabric.gather([float(bool(failed[0]))]).any():
        status, reason = failed if failed[0] else ("error", "another rank failed")
        return {"status": status, "reason": reason}, None
    assert subject is not None
    if setting.sync == "once":
        subject.step.update()
        subject.step.synchronize()
    for draw in range(DRAWS):
        subject.run(draw)
    compiled = subject.step.compiles()

    def one(share, draw):
        gc.collect()
        fabric.barrier()
        return timed(share.run, draw)

    own, baseline = [], []
    arrivals: list[list[float]] = []  # of each device of this rank
    ends: list[list[float]] = []
    gc.disable()
    try:
        for draw in range(rounds):
            if sgd:
                baseline.append(one(sgd, draw))
            own.append(one(subject, draw))
        if sgd:
            baseline.append(one(sgd, rounds - 1))
        for draw in range(PART_ROUNDS):
            fabric.barrier()
            mine, rest = subject.in_parts(draw)
            arrivals.append(mine)
            ends.append([max(mine) + rest])
    finally:
        gc.enable()
    parameters = subject.step.parameters()
    count = sum(p.size for p in parameters.values())
    reductions = [max(trips) if setting.sync == "every" else 1 for trips in subject.trips]
    reductions = reductions if setting.world_size > 1 else [0]  # nothing to send
    bare = fabric.gather(fabric.all_reduce_s(4 * count)).max(0)
    _agree(parameters, fabric)
    sizes = [subject.sizes[k % DRAWS] for k in range(rounds)]
    seconds = fabric.gather(own).max(0)
    arrived = np.stack([fabric.gather(mine).ravel() for mine in arrivals])
    ended = np.array([fabric.gather(e).max() for e in ends])
    found |= {
        "status": "ok",
        "reason": "",
        "rounds": rounds,
        "seconds": seconds.tolist(),
        "sizes": sizes,
        "seconds_per_step": float(np.median(seconds)),
        "examples_per_s": float(1 / np.median(seconds / sizes)),
        "update_s": float(np.median(ended - arrived.max(1))),
        "wait_s": float(np.median(arrived.max(1) - arrived.mean(1))),
        "comm_s": float(np.median(bare) * np.mean(reductions)),
        "parameters": int(count),
        "bytes_reduced": float(4 * count * np.mean(reductions)),
        "trips_mean": float(np.mean(subject.trips)),
        "trips_max": float(np.mean([max(trips) for trips in subject.trips])),
        "recompiles": subject.step.compiles() - compiled,
    }
    if found["recompiles"] and row.framework == "jax" and row.static_shapes:
        raise WrongResult(f"compiled {found['recompiles']} times more after warm-up")
    if sgd:
        base = fabric.gather(baseline).max(0)
        slow = ratios(seconds.tolist(), sizes, base.tolist())
        q1, median, q3 = np.percentile(slow, [25, 50, 75])
        found |= {
            "baseline_s": base.tolist(),
            "ratios": list(map(float, slow)),
            "slowdown": float(median),
            "slowdown_q1": float(q1),
            "slowdown_q3": float(q3),
            "slowdown_ci": interval(slow),
        }
    return found, subject


def _agree(parameters: dict[str, np.ndarray], fabric: Any) -> None:
    """Ranks that added different noise, or reduced different sums, have drifted apart."""
    finite = all(np.isfinite(p).all() for p in parameters.values())
    digest = hashlib.sha256(b"".join(p.tobytes() for p in parameters.values())).digest()
    # 16 bits a number: exact in the float32 of a gathering in JAX.
    words = np.frombuffer(digest[:16], np.uint16).astype(float)
    gathered = fabric.gather([*words, finite])
    if not gathered[:, -1].all():
        raise WrongResult("parameters are not finite after the timed steps")
    if (gathered != gathered[0]).any():
        raise WrongResult("the ranks' parameters differ after the timed steps")


def _hosts(fabric: Any) -> list[str]:
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    gathered = fabric.gather([float(byte) for byte in name.encode()[:64].ljust(64)])
    return [bytes(row.astype(np.uint8)).decode().strip() for row in gathered]


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(path)


def work(spec: dict[str, Any], fabric: Any, clock_hosts: list[str]) -> dict[str, Any]:
    """Measure all settings of a spec; rank 0 writes as it goes."""
    device, path = spec["device"], Path(spec["result"])
    first = fabric.ranks.rank == 0
    result: dict[str, Any] = {"hosts": clock_hosts, "all_reduce": [], "rows": {}}
    if first:
        facts = devices.describe(device)
        result["machine_info"] = facts | {"clocks": [devices.clocks(device)]}
    for size in spec["bytes"]:
        seconds = fabric.gather(fabric.all_reduce_s(size)).max(0)
        result["all_reduce"].append({"bytes": size, "seconds": seconds.tolist()})
    sgd: tuple[Any, Any] | None = None
    for setting in [Setting(**fields) for fields in spec["settings"]]:
        row = setting.case.row
        key = (row.baseline, setting.scaling)
        paired = row.private
        if paired and (sgd is None or sgd[0] != key):
            sgd = None  # free it before the next one is built
            _, built = measure(baseline(setting), fabric, device, 1, None)
            sgd = (key, built)
        found, subject = measure(
            setting, fabric, device, spec["rounds"], sgd[1] if paired and sgd else None
        )
        if row.name == row.baseline and setting.sync == "once":
            sgd = (key, subject)
        result["rows"][setting.id] = found
        if first:
            result["machine_info"]["clocks"][1:] = [devices.clocks(device)]
            write(path, result)
    return result


def baseline(setting: Setting) -> Setting:
    """The SGD that a private setting is paired with."""
    fields = vars(setting) | {"method": setting.case.row.baseline, "sync": "once"}
    return Setting(**fields | {"placement": "split"})


def main() -> None:
    """Measure what the spec asks for, as one of its ranks."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["device"] == "cpu":
        keep_freed_memory()
    fabric = None
    try:
        fabric = fabrics.connect(spec["framework"], spec["device"])
        world = fabric.ranks.world * fabric.shards
        if world != spec["world_size"]:
            raise RuntimeError(
                f"{world} devices take part, {spec['world_size']} were asked for: see how many "
                "ranks were started, and how many devices each one sees"
            )
        work(spec, fabric, _hosts(fabric))
    except BaseException as error:
        status, reason = outcome(error)
        failed = Path(f"{spec['result']}.failed")
        if not failed.exists():
            failed.write_text(json.dumps({"status": status, "reason": reason}))
        if fabric:
            fabric.close(error)
        raise
    fabric.close()


if __name__ == "__main__":
    main()
