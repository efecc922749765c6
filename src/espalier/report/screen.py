"""Where reports are printed: on a terminal as wide as it is, into a file or a pipe with room; names as they are."""

from __future__ import annotations

from rich.console import Console

WIDE = 150  # characters: room for reasons


def screen(*, stderr: bool = False) -> Console:
    """The terminal; where there is none, lines of `WIDE` characters, so that no table is cut to 80.

    >>> screen().width >= 150 or screen().is_terminal
    True
    """
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    return console


def tell(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: brackets are no markup, numbers have no colours, and long names are not broken.

    >>> tell(screen(), "runs/[a]/model.esp")
    runs/[a]/model.esp
    """
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
