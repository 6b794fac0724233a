"""
What is measured: a case is one method on one model at one size; a profile is a list of cases.

``smoke`` ⊂ ``quick`` ⊂ ``full``, by identical case ids.
"""

import re
from dataclasses import dataclass, replace

from dpsgd import METHODS, methods, models

PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one model. JAX always compiles, so its cases say ``compiled``."""

    model: str
    physical_batch: int
    method: str
    precision: str = "fp32"
    compile: bool = False

    @property
    def id(self) -> str:
        """``<model>-p<P>-<precision>-<eager|compiled>-<method>``."""
        mode = "compiled" if self.compile else "eager"
        return f"{self.model}-p{self.physical_batch}-{self.precision}-{mode}-{self.method}"

    @classmethod
    def parse(cls, case_id: str) -> "Case":
        """The case of an id."""
        match = re.fullmatch(r"(.+)-p(\d+)-(fp32|tf32|bf16)-(eager|compiled)-(.+)", case_id)
        if not match:
            raise ValueError(f"{case_id!r} is no case id: <model>-p<P>-<precision>-<mode>-<method>")
        return cls(
            model=match[1],
            physical_batch=int(match[2]),
            precision=match[3],
            compile=match[4] == "compiled",
            method=match[5],
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
        """L: 8P for the small CNN, 4P for the rest."""
        return (8 if models.get(self.model).family == "cnn" else 4) * self.physical_batch

    @property
    def ragged(self) -> bool:
        """No padding: the row takes variable shapes without cost (torch: in eager mode only)."""
        free = self.row.framework == "jax" or not self.compile
        return self.row.accepts_ragged and free


_CNN = ("digits-cnn", 64, ("eager",), ("fp32",))
# Cut to 3 blocks, or compiling 12 of them in JAX would take most of the time of the quick profile.
_TINY = ("vit-ti16-3blocks-64px", 16, ("eager",), ("fp32",))
# (model, P, torch modes, precisions)
PROFILES: dict[str, tuple[tuple[str, int, tuple[str, ...], tuple[str, ...]], ...]] = {
    "smoke": (_CNN,),
    "quick": (_CNN, _TINY),
    "full": (
        _CNN,
        _TINY,
        ("vit-ti16-4blocks", 16, ("eager", "compiled"), ("fp32",)),
        ("vit-s16-4blocks", 8, ("eager",), ("fp32",)),
    ),
    "gpu": (
        _CNN,
        ("vit-ti16", 128, ("eager", "compiled"), ("fp32", "bf16")),
        ("vit-b16", 32, ("eager", "compiled"), ("fp32", "bf16")),
    ),
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
    The cases of a profile, narrowed by what is asked for; a model outside of it runs at P=16.

    Raises:
        ValueError, KeyError: an unknown profile, method, model, precision or mode.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; use one of {', '.join(PROFILES)}")
    names = [methods.get(name).name for name in methods_wanted or METHODS]
    rows = list(PROFILES[profile])
    if models_wanted:
        known = {row[0]: row for row in rows}
        default = (16, ("eager",), ("fp32",))
        rows = [known.get(m, (models.get(m).name, *default)) for m in models_wanted]
    found = []
    for model, physical, torch_modes, own_precisions in rows:
        for precision in precisions or own_precisions:
            if precision not in PRECISIONS:
                raise ValueError(f"unknown precision {precision!r}; use {', '.join(PRECISIONS)}")
            for name in names:
                is_jax = METHODS[name].framework == "jax"
                if framework and METHODS[name].framework != framework:
                    continue
                for mode in ("compiled",) if is_jax else modes or torch_modes:
                    if mode not in ("eager", "compiled"):
                        raise ValueError(f"unknown mode {mode!r}; use eager, compiled or both")
                    found.append(
                        Case(
                            model=model,
                            physical_batch=physical,
                            precision=precision,
                            compile=mode == "compiled",
                            method=name,
                        )
                    )
    return found
