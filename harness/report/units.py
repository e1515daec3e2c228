"""Sizes and times in words."""


def amount(size_bytes: int) -> str:
    """A size in units that suit it."""
    unit, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size_bytes >= pair[1]), ("B", 1))
    return f"{size_bytes / size:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time in units that suit it: ``0.013 s``, ``41.2 s``, ``12 min 3 s``, ``7 h 5 min``, ``2 d 3 h``."""
    if seconds < 60:
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // part)} {smaller}"
    raise AssertionError("below a minute")
