"""
What several world sizes gave: rows with their efficiency, saved as every other run is.

``efficiency`` is the throughput of one rank over that of one rank of the smallest world measured,
in the same launch conditions; 1 is ideal, in strong and in weak scaling alike.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perf import chart, device, saved
from perf.outcome import outcome
from perf.partial import commit
from perf.plan import DELTA, STEPS, Setting
from perf.protocol import SCHEMA, blank

ON_CPU = "CPU ranks: a check of the code, not a measurement of scaling"


@dataclass(kw_only=True)
class Job:
    """
    One launch: its spec is in ``path``, its result beside it.

    Attributes:
        rows: {setting id: what its workers found}, as far as they came.
    """

    path: Path
    framework: str
    device: str
    world_size: int
    rounds: int
    sizes_bytes: Sequence[int]
    settings: Sequence[Setting]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    machine: dict[str, Any] | None = None
    hosts: list[str] = field(default_factory=list)
    all_reduce: list[dict[str, Any]] = field(default_factory=list)

    @property
    def result(self) -> Path:
        """Where rank 0 writes."""
        return self.path.with_suffix(".result")

    def left(self) -> list[Setting]:
        """The settings without an outcome."""
        return [setting for setting in self.settings if setting.id not in self.rows]

    def write(self) -> None:
        """The spec of what is left."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for old in (self.result, Path(f"{self.result}.failed")):
            old.unlink(missing_ok=True)
        spec = {
            "framework": self.framework,
            "device": self.device,
            "world_size": self.world_size,
            "rounds": self.rounds,
            "bytes": [] if self.all_reduce else list(self.sizes_bytes),
            "settings": [asdict(setting) for setting in self.left()],
            "result": str(self.result.absolute()),
        }
        self.path.write_text(json.dumps(spec, indent=1))

    @classmethod
    def load(cls, path: Path) -> "Job":
        """The job that a spec describes."""
        spec = json.loads(path.read_text())
        return cls(
            path=path,
            framework=spec["framework"],
            device=spec["device"],
            world_size=spec["world_size"],
            rounds=spec["rounds"],
            sizes_bytes=spec["bytes"],
            settings=[Setting(**fields) for fields in spec["settings"]],
        )

    def take(self) -> None:
        """Take over what the launch found."""
        if self.result.exists():
            found = json.loads(self.result.read_text())
            self.rows |= found["rows"]
            self.hosts, self.machine = found["hosts"], found["machine_info"]
            self.all_reduce = self.all_reduce or found["all_reduce"]

    def read(self, reason: str) -> None:
        """Take over what the launch found; ``reason`` if it died, at the first setting left."""
        self.take()
        if self.left():
            status, reason = "error", reason or "the launch ended without a result"
            failed = Path(f"{self.result}.failed")
            if failed.exists():
                known = json.loads(failed.read_text())
                status, reason = known["status"], known["reason"]
            self.rows[self.left()[0].id] = {"status": status, "reason": reason}

    def stop(self) -> None:
        """Take over what the launch found; what is left was stopped by the user."""
        self.take()
        status, reason = outcome(KeyboardInterrupt())
        for setting in self.left():
            self.rows[setting.id] = {"status": status, "reason": reason}

    def summary(self) -> str:
        """One line on how its settings ended."""
        found = [
            f"{s.method} {s.scaling} {s.sync}: "
            + (
                f"{self.rows[s.id]['examples_per_s']:,.0f} real ex/s"
                if self.rows[s.id]["status"] == "ok"
                else f"{self.rows[s.id]['status']}: {self.rows[s.id]['reason']}"
            )
            for s in self.settings
        ]
        return "; ".join(found)


def row(setting: Setting, job: Job) -> dict[str, Any]:
    """The row of a setting, measured or not."""
    found = job.rows.get(setting.id, {"status": "missing", "reason": "no result was written"})
    epsilon = setting.epsilon()
    nodes = len(set(job.hosts)) or 1
    where = f"{setting.world_size} devices on {nodes} node{'s' if nodes > 1 else ''}"
    return (
        blank(setting.case, "multi")
        | {
            "kind": "scaling",
            "case": setting.id,
            "sample_rate": setting.sample_rate,
            "epsilon": epsilon,
            "delta": DELTA,
            "steps": STEPS,
            "accountant": "pld",
            "neighbours": "add_remove",
            "nodes": nodes,
            "label": ON_CPU if job.device == "cpu" else where,
        }
        | {
            name: getattr(setting, name)
            for name in ("world_size", "scaling", "sync", "placement", "grows", "num_examples")
        }
        | found
    )


SAME = ("framework", "model", "method", "precision", "compile", "scaling", "sync", "placement")


def efficiencies(rows: Sequence[dict[str, Any]]) -> None:
    """Set ``efficiency`` and ``reference_world`` of each measured row."""
    for one in rows:
        if one["status"] != "ok":
            continue
        like = [
            other
            for other in rows
            if other["status"] == "ok" and all(other[name] == one[name] for name in SAME)
        ]
        least = min(like, key=lambda other: other["world_size"])
        rate = least["examples_per_s"] / least["world_size"]
        one["efficiency"] = one["examples_per_s"] / one["world_size"] / rate
        one["reference_world"] = least["world_size"]


def run(jobs: Sequence[Job]) -> dict[str, Any]:
    """The run of all jobs, in the form of every saved run."""
    rows = [row(setting, job) for job in jobs for setting in job.settings]
    efficiencies(rows)
    machine = next((job.machine for job in jobs if job.machine), None)
    hosts = max((job.hosts for job in jobs), key=len)
    return {
        "benchmarks": [],
        "rows": rows,
        "all_reduce": [
            {"framework": job.framework, "world_size": job.world_size} | found
            for job in jobs
            for found in job.all_reduce
        ],
        "machine_info": (machine or device.describe(jobs[0].device)) | {"hosts": hosts},
        "commit_info": {"id": commit()},
        "datetime": datetime.datetime.now().isoformat(),
        "version": SCHEMA,
    }


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run of the frameworks' own."""
    infos = [part["machine_info"] for part in parts]
    libraries: dict[str, str] = {}
    for info in infos:
        libraries |= info["libraries"]
    fingerprint = "+".join(sorted({info["fingerprint"] for info in infos}))
    return dict(parts[0]) | {
        "rows": [row for part in parts for row in part["rows"]],
        "all_reduce": [entry for part in parts for entry in part["all_reduce"]],
        "machine_info": infos[0] | {"libraries": libraries, "fingerprint": fingerprint},
    }


def finish(found: dict[str, Any]) -> int:
    """Save, print, plot; 1 if a setting is wrong or ended with an error."""
    folder = saved.FOLDER / found["machine_info"]["device"] / "runs"
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = saved.save(found, folder / f"{stamp}-multi.json")
    chart.show(found)
    for picture in chart.plot(found, path.with_suffix("")):
        print(f"plot {picture}")
    print(f"saved {path}")
    return int(any(row["status"] in ("wrong", "error", "missing") for row in found["rows"]))
