"""Make the options of a command from a dataclass: its names, types, defaults and docstring.

`transformers.HfArgumentParser` does the same, but needs transformers for `--help`. This needs the
standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fdd_kernels.common.errors import UserError
from fdd_kernels.common.sizes import parse_size


def numbers(kind: Callable[[str], Any], example: str) -> Callable[[str], tuple]:
    """Make a parser of numbers separated by commas."""

    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be numbers separated by commas, as in {example}"
            ) from None

    return parse


def number(kind: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    """Make a parser of one number, whose error says `name`."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None

    return parse


def word(text: str) -> str | None:
    """Parse a name; "none" is None."""
    return None if text.lower() == "none" else text


def layer_weights(text: str) -> tuple:
    """Parse numbers separated by commas, or with a semicolon rows of them."""
    one_row = numbers(float, "0.5,1 or 1,0;0.5,0.5")
    rows = tuple([one_row(row) for row in text.removesuffix(";").split(";")])
    return rows if ";" in text else rows[0]


# By annotation without "| None": the parser of a value, and its placeholder in the help.
KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "str": (word, "NAME"),
    "int": (number(int, "a whole number"), "N"),
    "float": (number(float, "a number"), "X"),
    "Path": (Path, "PATH"),
    "tuple[int, ...]": (numbers(int, "2,4,6"), "N,N"),
    "tuple[float, ...]": (numbers(float, "0.5,1"), "X,X"),
    "LayerWeights": (layer_weights, "X,X;X,X"),
    "tuple[str, ...]": (lambda text: tuple(text.split(",")), "NAME,NAME"),
}


def size(text: str) -> int:
    """Parse an amount of memory into bytes."""
    try:
        return parse_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flag(name: str) -> str:
    """--batch-size of batch_size."""
    return "--" + name.replace("_", "-")


def described(cls: type) -> dict[str, str]:
    """The text for each option under "Args:" in the docstrings of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")
        section = re.split(r"\n(?=\S)", section)[0]
        for entry in re.split(r"\n    (?=\S)", "\n" + section):
            names, colon, text = entry.partition(": ")
            if colon and re.fullmatch(r"[\w, ]+", names.strip()):
                found |= dict.fromkeys(re.split(r",\s*", names.strip()), " ".join(text.split()))
    return found


def option_fields(cls: type) -> Iterator[tuple[dataclasses.Field, str]]:
    """Yield the fields that can be options, with their annotation without "| None"; what may be
    given as text is "str".
    """
    for field in dataclasses.fields(cls):
        kind = str(field.type).removesuffix(" | None")
        kind = "str" if kind.endswith(" | str") else kind
        if kind == "bool" or kind in KINDS:
            yield field, kind


def require_at_least(options: Any, **bounds: int) -> None:
    """Raise UserError for a field below its bound; None passes."""
    for name, bound in bounds.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UserError(f"{name}={value} must be at least {bound}")


def require_choice(options: Any, **choices: Collection[str]) -> None:
    """Raise UserError for a field that is not among its choices; None passes if it is the
    default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name, allowed in choices.items():
        value = getattr(options, name)
        if value not in allowed and not (value is None and defaults[name] is None):
            raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def require_fraction(options: Any, name: str) -> None:
    """Raise UserError for a field outside of [0, 1); None passes."""
    value = getattr(options, name)
    if value is not None and not 0 <= value < 1:
        raise UserError(f"{name}={value} must be at least 0 and below 1")


def add_options(
    group: argparse._ActionsContainer,
    cls: type,
    names: Collection[str] | None = None,
    *,
    skip: Collection[str] = (),
    aliases: Mapping[str, tuple[str, ...]] | None = None,
    kinds: Mapping[str, tuple[Callable[[str], Any], str]] | None = None,
    required: Collection[str] = (),
) -> None:
    """Add the fields of a dataclass as options; an option not given is absent from the namespace.

    Args:
        names: the fields to add, in the order of the dataclass; None: all.
        skip: fields to leave out.
        aliases: further spellings of an option.
        kinds: parser and placeholder of an option, where they differ from those of its annotation.
        required: options that must be given.
    """
    texts = described(cls)
    for field, kind in option_fields(cls):
        if (names is not None and field.name not in names) or field.name in skip:
            continue
        parse, shown = (kinds or {}).get(field.name) or KINDS.get(kind, (None, None))
        text = texts.get(field.name, "").removesuffix(".").replace("%", "%%")
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        if (
            default not in (None, "", dataclasses.MISSING)
            and not isinstance(default, bool)
            and size is not parse
        ):
            text += f" ({default})"
        spellings = [flag(field.name), *(aliases or {}).get(field.name, ())]
        common = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if kind == "bool":
            group.add_argument(*spellings, action=argparse.BooleanOptionalAction, **common)
        else:
            needed = {"required": True} if field.name in required else {}
            group.add_argument(*spellings, type=parse, metavar=shown, **needed, **common)


def given_options(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the fields of a dataclass that were given as options."""
    names = [field.name for field, _ in option_fields(cls)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def in_flags(message: str, *classes: type) -> str:
    """Rewrite a message about fields of dataclasses for options: `batch_size=0` as
    `--batch-size 0`.
    """
    names = {field.name: kind for cls in classes for field, kind in option_fields(cls)}
    either = "|".join(sorted(names, key=len, reverse=True))
    if not either:
        return message

    def assigned(match: re.Match) -> str:
        name, value = match["name"], match["quoted"] or match["value"]
        if match["numbers"]:
            value = ",".join(re.split(r",\s*", match["numbers"].rstrip(",")))
        if names[name] == "bool" and value in ("True", "False"):
            return flag(name) if value == "True" else flag("no_" + name)
        return f"{flag(name)} {value}"

    message = re.sub(rf"FDDConfig\((?P<inner>(?:{either})=[^()]*)\)", r"\g<inner>", message)
    message = re.sub(
        rf"(?<![\w.\-])(?P<name>{either})=(?P<value>([\"'])(?P<quoted>[^\"']+)\3"
        r"|\((?P<numbers>[\d., e+-]+)\)|\w*)",
        assigned,
        message,
    )
    compound = "|".join(name for name in sorted(names, key=len, reverse=True) if "_" in name)
    return (
        re.sub(rf"(?<![\w./\-])({compound})(?![\w./=(])", lambda match: flag(match[1]), message)
        if compound
        else message
    )


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest option or command for an unknown one."""

    def spellings(self) -> list[str]:
        return [text for text in self._option_string_actions if text.startswith("--")]

    def check(self, arguments: Sequence[str]) -> None:
        """Refuse unknown options before argparse complains of missing ones."""
        for argument in arguments:
            name = argument.partition("=")[0]
            if re.match(r"--\w", name) and not any(
                known.startswith(name) for known in self.spellings()
            ):
                self.error(f"there is no option {name}{did_you_mean(name, self.spellings())}")


def did_you_mean(given: str, known: Collection[str]) -> str:
    """Suggest the nearest of `known`, by letters, else by shared words (--num-train-epochs and
    --epochs).
    """
    known = [name for name in known if name.startswith("--no-") == given.startswith("--no-")]
    words = set(given.strip("-").split("-"))

    def shared(name: str) -> tuple[float, int]:
        own = name.strip("-").split("-")
        count = len(words.intersection(own))
        return count / len(own), count

    close = difflib.get_close_matches(given, known, n=1, cutoff=0.75)
    close = close or [
        name for name in [max(known, key=shared, default="")] if name and shared(name)[1]
    ]
    close = close or difflib.get_close_matches(given, known, n=1)
    return f": did you mean {close[0]}?" if close else "; see --help"


def with_hyphens(arguments: Collection[str]) -> list[str]:
    """Write options with hyphens: --batch_size as --batch-size."""
    return [
        re.sub(r"^--[\w]+", lambda m: m[0].replace("_", "-"), argument) for argument in arguments
    ]
