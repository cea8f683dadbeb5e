"""Markdown tables."""


def table(header: list[str], rows: list[list[str]], align: str = "") -> str:
    """A Markdown table; `align` has an l or r for each column. Bars inside code are no borders for Python-Markdown."""
    marks = {"l": ":--", "r": "--:"}
    lines = [header, [marks[letter] for letter in align.ljust(len(header), "l")], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
