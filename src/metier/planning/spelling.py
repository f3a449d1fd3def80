"""How a plan writes counts, sizes and times: three digits."""

from __future__ import annotations


def count(number: int) -> str:
    """Of parameters, three digits."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 999.5 * unit else f"{number / unit:,.0f}{name}"
    return str(number)


def size(num_bytes: int) -> str:
    """In binary units, three digits."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}" if num_bytes else "0"
        amount /= 1024
    return f"{amount:,.3g} TiB"


def duration(seconds: float) -> str:
    """Three digits, or hours and minutes."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.3g} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
