"""The measurements: `python -m pytest perf` runs them; each tool runs as `python -m perf.NAME`."""
