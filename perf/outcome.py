"""What became of a case that raised: its status, and the reason in one line."""


class WrongResult(Exception):
    """A method that computes something else, or recompiles: it is not timed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Out of memory, and nothing else that ends a step."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("RESOURCE_EXHAUSTED", "can't allocate memory", "std::bad_alloc", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def outcome(error: BaseException, *, peer: bool = False) -> tuple[str, str]:
    """
    (status, reason): oom, missing, unsupported, wrong, interrupted or error.

    Whatever a peer raises is a limit of its own, which is a finding and no failure of the run.
    """
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, WrongResult):
        return "wrong", text
    if is_out_of_memory(error):
        return "oom", text[:200]
    if isinstance(error, ModuleNotFoundError):
        return "missing", text
    if isinstance(error, ValueError | NotImplementedError):
        return "unsupported", text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "stopped by the user"
    if peer and isinstance(error, Exception):
        return "unsupported", f"{type(error).__name__}: {text}"
    return "error", f"{type(error).__name__}: {text}"
