"""
The inputs of the default figure, each with its source: ranges, not measurements.

ViT-B/16 on the paper's setting: N=50,000, q=0.5, so that L=25,000; float32 gradients.
"""

from pathlib import Path

import numpy as np

from perf import saved
from perf.scaling.model import Load, Machine, Method, Range

PARAMETERS = 86_600_000  # ViT-B/16, arXiv:2010.11929, table 1
# Multiply-adds of one example forward: 12 blocks of T=197 positions and width d=768, each 12Td² in
# its linear layers and 2T²d in its attention, and the patches. Forward and backward are three times
# that, and a multiply-add is two FLOPs.
TRAIN_FLOPS = 3 * 2 * (12 * (12 * 197 * 768**2 + 2 * 197**2 * 768) + 196 * 768**2)
PHYSICAL_BATCH = 32  # what per-example gradients of ViT-B leave room for on a 32 GB device
CLAIMED = {"SGD": 0.533, "DP-SGD": 0.692}  # of ideal on 80 V100, arXiv:2406.17298; not verified

LOAD = Load(expected_batch=25_000, num_examples=50_000, parameters=PARAMETERS)

_NCCL = (
    "NCCL 2.8, src/graph/tuning.cc, ring over the network: 4.0 µs a hop (LL128), 9.6 (Simple), "
    "18.2 (Simple, at its plateau, ×1.9)"
)
_FIX = "assumed: launches, host work and barriers, 1 to 50 ms; a fit of measured runs replaces it"
_ALPHA = Range(low=4.0e-6, likely=9.6e-6, high=18.2e-6)
_FIX_S = Range(low=1e-3, likely=1e-2, high=5e-2)


def _roofline(peak_flops: float, low: float, likely: float, high: float) -> Range:
    low, likely, high = (share * peak_flops / TRAIN_FLOPS for share in (low, likely, high))
    return Range(low=low, likely=likely, high=high)


MACHINES = {
    "v100": Machine(
        name="V100 nodes, fp32",
        examples_per_s=_roofline(15.7e12, 0.5, 0.7, 0.85),
        alpha_s=_ALPHA,
        bytes_per_s=Range(low=10e9, likely=20e9, high=25e9),
        memory_bytes_per_s=Range(low=300e9, likely=600e9, high=800e9),
        fix_s=_FIX_S,
        sources={
            "examples_per_s": "50, 70, 85 % of 15.7 TFLOP/s (NVIDIA V100 SXM2 data sheet) over "
            "105 GFLOP an example",
            "alpha_s": _NCCL,
            "bytes_per_s": "CSC's description of Puhti's GPU nodes: four V100, dual-rail HDR100, "
            "25 GB/s a node, which the ring enters once; likely 80 % of it, low 80 % of one rail",
            "memory_bytes_per_s": "a third to 90 % of 900 GB/s (V100 data sheet)",
            "fix_s": _FIX,
        },
    ),
    "a100": Machine(
        name="A100 nodes, TF32",
        examples_per_s=Range(low=185, likely=309, high=515),
        alpha_s=_ALPHA,
        bytes_per_s=Range(low=20e9, likely=80e9, high=190e9),
        memory_bytes_per_s=Range(low=500e9, likely=1000e9, high=1400e9),
        fix_s=_FIX_S,
        sources={
            "examples_per_s": "low: all of 19.5 TFLOP/s without tensor cores (A100 data sheet) "
            "over 105 GFLOP; high: half of 1,030 examples/s measured in fp16 "
            "(willgpaik.github.io/portfolio/pytorch-ddp-bench), TF32's peak being half of fp16's; "
            "likely: their geometric mean",
            "alpha_s": _NCCL,
            "bytes_per_s": "25 GB/s of each HDR adapter (NVIDIA DGX A100 data sheet, eight a "
            "node): one at 80 %, four at 80 %, eight at 95 %",
            "memory_bytes_per_s": "a third to 90 % of 1,555 GB/s (A100 data sheet)",
            "fix_s": _FIX,
        },
    ),
}

SGD_EVERY = Method(
    name="SGD, all-reduce at every physical batch", physical_batch=PHYSICAL_BATCH, sync="every"
)
SGD_ONCE = Method(name="SGD, once per logical batch", physical_batch=PHYSICAL_BATCH)


def private(name: str, slowdown: Range) -> Method:
    """A DP method of that slowdown, which synchronises once per logical batch."""
    return Method(name=name, physical_batch=PHYSICAL_BATCH, slowdown=slowdown, private=True)


HOOKS = private("DP-SGD, Opacus hooks", Range(low=2.6, likely=4.6, high=8))
GHOST = private("DP-SGD, ghost clipping", Range(low=1.3, likely=2.3, high=4))
BOOKKEEPING = private("DP-SGD, book-keeping", Range(low=1.15, likely=1.26, high=1.43))
SLOWDOWN_SOURCES = {
    HOOKS.name: "2.6 to 8, abstract of arXiv:2406.17298; likely: geometric mean",
    GHOST.name: "half of it, same abstract",
    BOOKKEEPING.name: "throughput 0.70 to 0.87 of SGD in published runs of BEiT and GPT-2; "
    "likely: 1.26 × its FLOPs, counted",
}


def measured_slowdowns(folder: Path = saved.FOLDER) -> dict[tuple[str, str], Range]:
    """
    {(device, method): slowdown over the ViT models of the committed baselines}.

    Low and high are the extremes over models and modes, likely the median. CPU rows say what the
    method costs there, not on a GPU.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for path in sorted(folder.glob("*/*.json")):
        run = saved.load(path)
        for row in saved.steps(run):
            if row["status"] == "ok" and row.get("slowdown") and row["model"].startswith("vit"):
                key = (run["machine_info"]["device"], row["method"])
                found.setdefault(key, {})[row["case"]] = row["slowdown"]
    return {
        key: Range(
            low=min(values.values()),
            likely=float(np.median(list(values.values()))),
            high=max(values.values()),
        )
        for key, values in found.items()
    }
