"""
What is measured: a case is one method on one model at one size; a profile is a list of cases.

``smoke`` ⊂ ``quick`` ⊂ ``full``, by identical case ids. ``full-torch`` holds the larger comparisons
of torch's methods at L = 8P, and at L = P and 64P, ``full-jax`` those of JAX's, with two of torch's
rows beside them; ``gpu-torch`` and ``gpu-jax`` those of one large GPU. All are long:
``--resume`` measures them in parts.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from dpsgd import METHODS, methods, models

PRECISIONS = ("fp32", "tf32", "bf16")
_SLOW = ("vit-s16", "vit-b16-4blocks")  # a step takes a CPU half a minute
_SLOW_IN_JAX = ("bit-r50x1-128px", "distilbert-64tok")  # or one peer alone would take 6 minutes


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one model. JAX always compiles, so its cases say ``compiled``."""

    model: str
    physical_batch: int
    method: str
    precision: str = "fp32"
    compile: bool = False
    wanted_batch: int | None = None  # L where it is not the model's usual one

    def __post_init__(self) -> None:
        if self.wanted_batch == self._usual_batch:  # one case, one id
            object.__setattr__(self, "wanted_batch", None)

    @property
    def id(self) -> str:
        """``<model>-p<P>[-l<L>]-<precision>-<eager|compiled>-<method>``."""
        mode = "compiled" if self.compile else "eager"
        size = f"-l{self.wanted_batch}" if self.wanted_batch else ""
        return f"{self.model}-p{self.physical_batch}{size}-{self.precision}-{mode}-{self.method}"

    @classmethod
    def parse(cls, case_id: str) -> "Case":
        """The case of an id."""
        pattern = r"(.+)-p(\d+)(?:-l(\d+))?-(fp32|tf32|bf16)-(eager|compiled)-(.+)"
        if not (match := re.fullmatch(pattern, case_id)):
            raise ValueError(
                f"{case_id!r} is no case id: <model>-p<P>[-l<L>]-<precision>-<mode>-<method>"
            )
        return cls(
            model=match[1],
            physical_batch=int(match[2]),
            wanted_batch=int(match[3]) if match[3] else None,
            precision=match[4],
            compile=match[5] == "compiled",
            method=match[6],
        )

    @property
    def row(self) -> methods.Method:
        """The registry row of the method."""
        return methods.get(self.method)

    @property
    def baseline(self) -> "Case":
        """The same case with the SGD that the method is paired with."""
        return replace(self, method=self.row.baseline)

    @property
    def expected_batch(self) -> int:
        """L; usually 8P for the small CNN, 4P for the rest."""
        return self.wanted_batch or self._usual_batch

    @property
    def _usual_batch(self) -> int:
        return (8 if models.get(self.model).family == "cnn" else 4) * self.physical_batch

    @property
    def long(self) -> bool:
        """A step of so many physical batches that few of them are timed."""
        slow = self.model in _SLOW + (_SLOW_IN_JAX if self.row.framework == "jax" else ())
        return slow or self.expected_batch >= 32 * self.physical_batch

    @property
    def rounds(self) -> int:
        """Timed rounds: the fewest for a verdict of ``perf.compare`` in the larger profiles."""
        return 3 if self.long else 7 if self.wanted_batch else 9

    @property
    def warm_up(self) -> int:
        """Rounds before them; a long step follows the check, which has warmed it up."""
        return 0 if self.long else 1 if self.wanted_batch else 2

    @property
    def draws(self) -> int:
        """Rounds cycle through as many logical batches."""
        return 1 if self.long else 3

    @property
    def ragged(self) -> bool:
        """No padding: the row takes variable shapes without cost."""
        return not self.row.pads(self.compile)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Cases of one model and size: each registered method that the fields let in, in each mode."""

    model: str
    physical_batch: int
    times: int | None = None  # L/P, where it is not the model's usual one
    modes: tuple[str, ...] = ("eager",)  # torch's; JAX always compiles
    precisions: tuple[str, ...] = ("fp32",)
    frameworks: tuple[str, ...] = ("torch", "jax")
    peers: bool = True
    without: tuple[str, ...] = ()
    only: tuple[str, ...] = ()  # empty: all

    def takes(self, row: methods.Method) -> bool:
        """Whether the method has cases here."""
        kept = row.framework in self.frameworks and row.name not in self.without
        wanted = not self.only or row.name in self.only
        return kept and wanted and (row.ours or self.peers)

    def case(self, method: str, mode: str, precision: str) -> Case:
        """One case."""
        return Case(
            model=self.model,
            physical_batch=self.physical_batch,
            precision=precision,
            compile=mode == "compiled",
            method=method,
            wanted_batch=self.times * self.physical_batch if self.times else None,
        )


def _torch(model: str, physical_batch: int, times: int = 8, **more) -> Block:
    # vmap holds P gradients as Opacus does and is slower: it has its place in the smaller profiles.
    without = ("torch-vmap", *more.pop("without", ()))
    options = {"times": times, "frameworks": ("torch",), "without": without, **more}
    return Block(model=model, physical_batch=physical_batch, **options)


def _jax(model: str, physical_batch: int, **more) -> tuple[Block, Block]:
    # vmap recompiles for a minute at each new size, and Optax' clip is masked's: they have their
    # place in the smaller profiles.
    without = ("jax-vmap", "jax-optax", *more.pop("without", ()))
    options: dict[str, Any] = {"model": model, "physical_batch": physical_batch, "times": 8}
    both = "torch-sgd", "torch-bookkeeping"
    jax = Block(**options, frameworks=("jax",), without=without, **more)
    return jax, Block(**options, frameworks=("torch",), only=both)


_PRECISE: dict[str, Any] = {"times": 8, "peers": False, "precisions": ("fp32", "tf32", "bf16")}


def _gpu(physical_batch: int) -> Block:
    more: dict[str, Any] = {"modes": ("eager", "compiled"), **_PRECISE}
    return _torch("vit-b16", physical_batch, **more)


def _gpu_jax(physical_batch: int) -> Block:
    options: dict[str, Any] = {"model": "vit-b16", "physical_batch": physical_batch, **_PRECISE}
    return Block(**options, frameworks=("jax",), without=("jax-vmap",))


_CNN = Block(model="digits-cnn", physical_batch=64)
# Cut to 3 blocks, or compiling 12 of them in JAX would take most of the time of the quick profile.
_TINY = Block(model="vit-ti16-3blocks-64px", physical_batch=16)
_BOTH: tuple[str, ...] = ("eager", "compiled")
PROFILES: dict[str, tuple[Block, ...]] = {
    "smoke": (_CNN,),
    "quick": (_CNN, _TINY),
    "full": (
        _CNN,
        _TINY,
        Block(model="vit-ti16-4blocks", physical_batch=16, modes=_BOTH),
        Block(model="vit-s16-4blocks", physical_batch=8),
    ),
    # What the smaller profiles tell is not repeated. On 2 cores an hour: ViT-Ti 13 min, ViT-S 9,
    # BiT 12 and its sweep of L 9, DistilBERT 9 and frozen 11. Without AVX-512 half as much again.
    "full-torch": (
        _torch("vit-ti16", 16, without=("torch-ghost",)),
        _torch("vit-s16", 8, without=("torch-ghost",)),
        _torch("bit-r50x1-128px", 8),
        _torch("bit-r50x1-128px", 8, times=1, without=("torch-ghost", "torch-opacus-ghost")),
        _torch("bit-r50x1-128px", 8, times=64, peers=False, without=("torch-ghost",)),
        _torch("distilbert-64tok", 8),  # Opacus cannot run its position table: a row that says so
        _torch("distilbert-64tok-frozenemb", 8, without=("torch-ghost",)),
    ),
    # On 2 cores an hour: ViT-Ti 15 min, ViT-B 12, BiT 9, DistilBERT 11, memory 10.
    "full-jax": (
        *_jax("vit-ti16", 16, without=("jax-ghost", "jax-privacy")),
        *_jax("vit-b16-4blocks", 8, without=("jax-ghost",)),
        *_jax("bit-r50x1-128px", 8, without=("jax-ghost", "jax-privacy")),
        *_jax("distilbert-64tok", 8, without=("jax-ghost",)),
    ),
    "gpu": (
        _CNN,
        Block(model="vit-ti16", physical_batch=128, modes=_BOTH, precisions=("fp32", "bf16")),
        Block(model="vit-b16", physical_batch=32, modes=_BOTH, precisions=("fp32", "bf16")),
    ),
    # In parts of 8 minutes on one H200 (estimated: SGD at fp32 makes 400 examples a second):
    # `--resume --precision fp32 -k "p256 and eager"`, `… -k "p256 and compiled"`, `… -k p64`,
    # `--resume --precision tf32`, `--resume --precision bf16`; `--resume` alone gives the whole.
    "gpu-torch": (_gpu(64), _gpu(256)),
    # Compiling takes a minute or more for each case. In parts of 8 minutes: `--resume --precision
    # fp32 -k p256`, `… -k p64`, the same with tf32 and bf16; `--resume` alone gives the whole.
    "gpu-jax": (_gpu_jax(64), _gpu_jax(256)),
}


def cases(
    profile: str,
    *,
    framework: str | None = None,
    methods_wanted: list[str] | None = None,
    models_wanted: list[str] | None = None,
    precisions: list[str] | None = None,
    modes: tuple[str, ...] | None = None,
) -> list[Case]:
    """
    The cases of a profile, narrowed by what is asked for.

    A model outside of the profile runs at P=16, with the methods of the profile's first model.

    Raises:
        ValueError, KeyError: an unknown profile, method, model, precision or mode.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; use one of {', '.join(PROFILES)}")
    for name in precisions or ():
        if name not in PRECISIONS:
            raise ValueError(f"unknown precision {name!r}; use {', '.join(PRECISIONS)}")
    for name in modes or ():
        if name not in _BOTH:
            raise ValueError(f"unknown mode {name!r}; use eager, compiled or both")
    rows = [methods.get(name) for name in methods_wanted or METHODS]
    found = []
    for block in _blocks(profile, models_wanted):
        for precision in precisions or block.precisions:
            for number, mode in enumerate(modes or block.modes):
                for row in rows:
                    if framework not in (None, row.framework) or not block.takes(row):
                        continue
                    if row.framework == "torch" or number == 0:
                        its_mode = mode if row.framework == "torch" else "compiled"
                        found.append(block.case(row.name, its_mode, precision))
    if not found and framework is None:
        raise ValueError(f"the profile {profile} has no case of {', '.join(methods_wanted or [])}")
    return found


def _blocks(profile: str, models_wanted: list[str] | None) -> list[Block]:
    blocks, found = PROFILES[profile], []
    for name in models_wanted or []:
        models.get(name)
        other = replace(
            blocks[0], model=name, physical_batch=16, modes=("eager",), precisions=("fp32",)
        )
        found += [block for block in blocks if block.model == name] or [other]
    return found or list(blocks)
