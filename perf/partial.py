"""
Finished cases of a run that is not: one file each, so that ``--resume`` measures only the rest.

They lie in ``.benchmarks/<device>/runs/<profile>.partial/`` and count for the same fingerprint and
commit only. Errors, wrong results and what was interrupted are measured again.
"""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from perf import device, saved
from perf.protocol import SCHEMA

FINISHED = ("ok", "oom", "unsupported")


def commit() -> str:
    """The commit that is checked out; ``unknown`` without git."""
    command = ["git", "rev-parse", "HEAD"]
    where = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


class Partial:
    """The finished cases of one profile on one device."""

    def __init__(self, where: str, profile: str, *, any_commit: bool = False) -> None:
        self.folder = saved.FOLDER / device.slug(where) / "runs" / f"{profile}.partial"
        self.facts = {"schema": SCHEMA, "fingerprint": device.describe(where)["fingerprint"]}
        self.commit, self.any_commit = commit(), any_commit
        self.refused = 0

    def _path(self, case_id: str) -> Path:
        short = hashlib.sha256(case_id.encode()).hexdigest()[:8]  # ids may grow long
        return self.folder / f"{case_id[:100]}-{short}.json"

    def take(self, case_id: str) -> dict[str, Any] | None:
        """``{"row", "benchmark"}`` of a finished case, None if it is to be measured."""
        path = self._path(case_id)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        same = all(found[name] == value for name, value in self.facts.items())
        if not same or not (self.any_commit or found["commit"] == self.commit):
            self.refused += 1
            return None
        return found

    def keep(self, row: dict[str, Any], benchmark: dict[str, Any] | None) -> None:
        """Keep a case if it is finished; ``benchmark`` is pytest-benchmark's entry, if it timed."""
        if row["status"] not in FINISHED:
            return
        path = self._path(row["case"])
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = self.facts | {"commit": self.commit, "row": row, "benchmark": benchmark}
        partial = path.with_suffix(".new")
        partial.write_text(json.dumps(entry, default=str, ensure_ascii=False))
        partial.replace(path)

    def remove(self) -> None:
        """Forget all; the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def left(rows: list[dict[str, Any]], wanted: list[str]) -> list[str]:
    """The ids among ``wanted`` that ``rows`` does not hold finished."""
    done = {row["case"] for row in rows if row["status"] in FINISHED}
    return [case_id for case_id in wanted if case_id not in done]
