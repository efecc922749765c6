"""How options are written: with dashes, and flags without a value, in the help as on the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from espalier.errors import DataError

_OPTION = re.compile(r"--[a-z][a-z_.]*")
_TRUTH = (["true"], ["false"])


class Parser(ArgumentParser):
    """Shows ``--max-drop`` for the parameter ``max_drop``, and a usage of one line.

    argparse's own usage fills a terminal before it comes to what went wrong.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "formatter_class": _Help})

    def format_help(self, *args: Any) -> str:
        """The help with a usage of one line, options with dashes."""
        text = re.sub(r"\Ausage: .*?\n\n", lambda _: f"{self.format_usage()}\n", super().format_help(*args), flags=re.S)
        return _dashed(text)

    def format_usage(self) -> str:
        """One line: the command and what must stand there; options are listed below it."""
        named = [action.metavar or action.dest for action in self._actions if not action.option_strings]
        words = ["COMMAND" if name == "subcommand" else str(name) for name in named]
        return f"usage: {' '.join([self.prog.replace(' [options]', ''), '[options]', *words])}\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2 and the message, in short and with dashes."""
        super().error(_dashed(shortened(message)), ex)


class _Help(DefaultHelpFormatter):
    """Types in short, and no default where there is none."""

    def _get_help_string(self, action: Any) -> str:
        text = super()._get_help_string(action)
        return text.replace(", default: %(default)s", "") if action.default in (None, "") else text

    def _get_type_str(self, action: Any) -> str | None:
        text = super()._get_type_str(action)
        return text and re.sub(r"^Optional\[(.*)\]$", r"\1", text.removesuffix(" | null"))


def written(arguments: Iterable[str], commands: Iterable[Callable[..., Any]]) -> list[str]:
    """Arguments as jsonargparse takes them: ``--max-drop`` is ``--max_drop``, the flag ``--resume`` ``--resume=true``.

    >>> def command(resume: bool = False) -> None: ...
    >>> written(["--data-root", "x-y", "--resume"], [command])
    ['--data_root', 'x-y', '--resume=true']
    """
    given = list(arguments)
    parameters = [p for command in commands for p in inspect.signature(command).parameters.values()]
    flags = {f"--{parameter.name}" for parameter in parameters if parameter.default is False}
    made = []
    for k, argument in enumerate(given):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
            if argument in flags and given[k + 1 : k + 2] not in _TRUTH:
                argument += "=true"
        made.append(argument)
    return made


def shortened(message: str) -> str:
    """What jsonargparse says in ten lines of a value that fits no type; any other message as it is.

    >>> shortened("Parser key 'density':\\n  Errors:\\n    - Expected a <class 'float'>\\n  Given value: nan")
    '--density is nan, expected float'
    """
    option = ".".join(re.findall(r"Parser key ['\"](.+?)['\"]", message))
    if option and (nested := re.search(r"^ *(?:--(\S+)( is .+)|Option '(\w+)' is not accepted)$", message, re.M)):
        return f"--{option}.{nested[1] or nested[3]}{nested[2] or ': there is no such option'}"
    if ours := re.search(r"Errors:\n *- (?!Expected|Problem)(.+)$", message, re.M):
        return ours[1]
    kinds = re.findall(r"Expected an? (?:<class '|typing\.Literal\[)(.+?)(?:'>|\])", message)
    wanted = [kind for kind in kinds if kind != "NoneType"]
    got = re.search(r"(?:Given|Got) value: (.+)$", message, re.M)
    return f"--{option} is {got[1]}, expected {wanted[0]}" if got and len(wanted) == 1 else message


def at_least_one(**counts: int | None) -> None:
    """Raise DataError for a count below 1; None stands for a default.

    >>> at_least_one(threads=0)
    Traceback (most recent call last):
    espalier.errors.DataError: --threads is 0, expected 1 or more
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise DataError(f"--{name.replace('_', '-')} is {count}, expected 1 or more")


def _dashed(text: str) -> str:
    return _OPTION.sub(lambda found: found[0].replace("_", "-"), text)
