"""How numbers are written for people: one spelling for sizes, counts, times and differences everywhere."""

from __future__ import annotations

MISSING = "–"
_MINUS = "\u2212"


def count(value: float | None) -> str:
    """1,234 up to ten thousand, then 12.3 K, 45.6 M, 7.8 B."""
    if value is None:
        return MISSING
    for limit, divisor, unit in ((1e9, 1e9, " B"), (1e6, 1e6, " M"), (1e4, 1e3, " K")):
        if abs(value) >= limit:
            return f"{value / divisor:.1f}{unit}"
    return f"{value:,.0f}"


def size(num_bytes: float | None) -> str:
    """Bytes in powers of 1000: 512 B, 3.4 KB, 12.0 MB, 1.2 GB."""
    if num_bytes is None:
        return MISSING
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if abs(num_bytes) >= divisor:
            return f"{num_bytes / divisor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return MISSING
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def share(value: float | None, *, digits: int = 0) -> str:
    """A fraction as per cent: 0.943 is 94%."""
    return MISSING if value is None else f"{100 * value:.{digits}f}%".replace("-", _MINUS)


def number(value: float | None, *, digits: int) -> str:
    """A fixed number of decimals, with a true minus sign."""
    return MISSING if value is None else f"{value:,.{digits}f}".replace("-", _MINUS)


def signed(value: float | None, *, digits: int) -> str:
    """A difference: always with its sign, except where it rounds to nothing."""
    if value is None:
        return MISSING
    text = f"{value:+,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text[1:]
    return text.replace("-", _MINUS)
