"""Bytes and ratios as a reader sees them."""


def format_bytes(num_bytes: float) -> str:
    """A number of bytes for a reader, in powers of 1,000 and three digits: '1.11 GB'."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            break
        value /= 1000
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"


def format_ratio(ratio: float) -> str:
    """A ratio for a reader: '12.3 %'."""
    return f"{100 * ratio:.1f} %"
