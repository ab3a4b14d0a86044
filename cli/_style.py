"""Layout of the help: options by group, defaults with their origin, examples at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from llamamoe.errors import InvalidRecipeError, LlamaMoeError

SECTIONS = ("Convert", "Train", "Inspect and verify", "Measure", "Other commands")
"""The order of sections in ``llamamoe --help``."""
GENERAL = "General"


class HelpFormatter(click.HelpFormatter):
    """Click's, with bold headings (on a terminal only)."""

    def write_heading(self, heading: str) -> None:
        """Bold."""
        self.write(f"{'':>{self.current_indent}}{click.style(heading + ':', bold=True)}\n")


class Context(click.Context):
    """Click's, with our formatter."""

    formatter_class = HelpFormatter


class Count(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.2
    """A whole number, which may have a unit: ``65536``, ``64k``, ``1M``, ``64Ki``."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it as recipes do, or say what is accepted."""
        from llamamoe.recipes import COUNT_RULE, count_of

        number = count_of(value)
        try:
            return int(number)
        except ValueError:
            self.fail(f"{value!r} is not {COUNT_RULE}.", param, ctx)


COUNT = Count()
"""The type of every option that is a number of tokens."""


class Option(click.Option):
    """An option that belongs to a group of the help.

    Args:
        group: The heading under which it stands.
        explain: Writes its help when it is asked for, because the text needs an import.
        key: Its name in the library and in recipes, if it is not that of the function's argument.
    """

    def __init__(
        self,
        *args: Any,
        group: str = GENERAL,
        explain: Callable[[], str] | None = None,
        key: str | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(*args, **keys)
        self.group = group
        self.explain = explain
        self.key = key or self.name or ""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Click's, with the help written on demand, and the units of a number of tokens."""
        if self.explain is not None:
            self.help = self.explain()
        record = super().get_help_record(ctx)
        if record is None or not isinstance(self.type, Count):
            return record
        return record[0].replace(f" {self.metavar}", f" {self.metavar}[k|M]"), record[1]


class Command(click.Command):
    """A command with options by group and examples.

    Args:
        section: Where ``llamamoe --help`` lists it, one of `SECTIONS`.
        rank: Its place in the section.
        examples: Command lines, one a line.
    """

    context_class = Context

    def __init__(self, *args: Any, section: str = SECTIONS[-1], rank: int = 9, examples: str = "", **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.section = section
        self.order = (SECTIONS.index(section), rank)
        self.examples = examples

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error about a value that a flag gave names the flag."""
        try:
            return super().invoke(ctx)
        except LlamaMoeError as error:
            raise spell_flags(error, ctx) from error.__cause__

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options by group, the general ones at the end."""
        rows = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                rows.append((getattr(param, "group", GENERAL), record))
        rows.sort(key=lambda row: row[0] == GENERAL)
        write_sections(formatter, rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Units of numbers, and examples line by line as written."""
        if any(isinstance(param.type, Count) for param in self.params):
            with formatter.section("Units"):
                formatter.write(" " * formatter.current_indent + "64k is 64,000; 1M is 1,000,000; 64Ki is 65,536.\n")
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.strip().splitlines():
                    formatter.write(" " * formatter.current_indent + line + "\n")


def spell_flags(error: LlamaMoeError, ctx: click.Context) -> LlamaMoeError:
    """Return an error of the library with flags in the place of names of values that the command line gave."""
    flags = {
        option.key: option.opts[-1]
        for option in ctx.command.params
        if isinstance(option, Option)
        and ctx.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
    }
    if not isinstance(error, InvalidRecipeError):
        error.message = _spelled(error.message, flags, begins=True)
        return error
    spelled = [_spelled_problem(key, rule, flags) for key, rule in error.problems]
    if any(each == problem for each, problem in zip(spelled, error.problems, strict=True)):
        return InvalidRecipeError(spelled, hint=error.hint)
    return InvalidRecipeError(spelled, title="invalid values" if len(spelled) > 1 else "", hint=error.hint)


def _spelled_problem(key: str, rule: str, flags: Mapping[str, str]) -> tuple[str, str]:
    """Return a problem of a recipe with flags; a flag stands for everything below its key."""
    given = next((flags[name] for name in flags if key == name or key.startswith(f"{name}.")), key)
    return given, _spelled(rule, flags, begins=False)


def _spelled(text: str, flags: Mapping[str, str], *, begins: bool) -> str:
    """Return a text with flags before ``= value`` and, with ``begins``, where a line begins with a value's name."""
    for name, spelling in flags.items():
        key = re.escape(name)
        pattern = rf"(?<![\w.-]){key}(?= = )" + (rf"|^{key}(?=: | is )" if begins else "")
        text = re.sub(rf"(?m){pattern}", spelling, text)
    return text


def write_sections(formatter: click.HelpFormatter, rows: list[tuple[str, tuple[str, str]]]) -> None:
    """Write (heading, row) pairs: every heading once, in the order of its first row, one column width for all."""
    width = min(30, max((len(first) for _, (first, _) in rows), default=0))
    for heading in dict.fromkeys(heading for heading, _ in rows):
        with formatter.section(heading):
            formatter.write_dl([(first.ljust(width), text) for h, (first, text) in rows if h == heading])


class Name(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.2
    """A name out of a list that is read when it is needed: plug-ins show up by themselves.

    Nothing is refused here: the recipe checks all names and values at once and tells near misses.

    Args:
        names: Returns the list.
    """

    name = "name"

    def __init__(self, names: Callable[[], list[str]]) -> None:
        self.names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin with what was typed."""
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


def flag(*spellings: str, group: str, text: str, **keys: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An `Option` as a decorator.

    Args:
        spellings: As click takes them.
        group: The heading under which it stands.
        text: Its help.
        **keys: What else click takes.
    """
    return click.option(*spellings, cls=Option, group=group, help=text, **keys)


def run_options(
    group: str, *, resume: str = "Resume an interrupted run.", force: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--resume`` and ``--force``, of commands that put OUT together in OUT.partial."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        forced = flag("--force", group=group, is_flag=True, text=force)
        return flag("--resume", group=group, is_flag=True, text=resume)(forced(function))

    return decorate


def partial_options(group: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same where OUT is never replaced."""
    resume = "Resume an interrupted run from OUT.partial."
    return run_options(group, resume=resume, force="Discard the files of an interrupted run in OUT.partial.")


def check_resume_or_force(resume: object, force: bool) -> None:
    """Refuse both together."""
    if resume and force:
        raise click.UsageError("--resume and --force are mutually exclusive.")


def tokenizer_option(group: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--tokenizer``: in the place of the vocabulary of a GGUF file."""
    text = "For a GGUF file: folder with the tokenizer files to use.  [default: the tokenizer in the file]"
    return flag("--tokenizer", group=group, metavar="FOLDER", text=text)


def model_options(group: str, *, several: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--dtype`` and ``--device``: how models are held that are only run; ``several``: on more than one device, too."""
    devices = "A torch device. Several devices (cuda:0,cuda:1) or all: one copy of the model on each GPU. spread: one copy across all GPUs."

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        text = f"{devices if several else 'A torch device, such as cpu or cuda:0.'}  [default: auto, the GPU if there is one]"
        device = flag("--device", group=group, metavar="NAME", default="auto", text=text)
        dtype = flag("--dtype", group=group, metavar="NAME", default="auto",
                     text="Dtype to run in: float32, bfloat16 or float16.  [default: auto, as stored]")  # fmt: skip
        return dtype(device(function))

    return decorate
