"""The command line of `python -m mst_fx`."""

from __future__ import annotations

import ast
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from mst_fx.command.doctor import examined
from mst_fx.command.target import ExplainError, explained

INNER = ("inductor", "aot_eager", "eager")
EXPLAIN = """Compile a function, run it once, and print what is looped, what is not, and why.

The function takes no arguments. Either it returns what is to be compiled and its arguments, as (function, arguments) or
(function, arguments, keyword arguments):

    def sample():
        return train_step, (ids, labels)

or it is a training step itself:

    def step():
        return model(input_ids=ids, labels=labels).loss

It is called once without compiling, to tell which. --step says that it is a step, which then runs compiled alone.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; by default those of this process.

    Returns:
        The exit status: 0, or 1 where something is wrong. Wrong arguments exit with 2.
    """
    given = _parser().parse_args(arguments)
    status: int = given.run(given)
    return status


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m mst_fx", description="Ask what mst_fx does, and whether it works here.")
    commands = parser.add_subparsers(required=True, metavar="command")
    explain = commands.add_parser(
        "explain",
        help="compile a function and print the report",
        description=EXPLAIN,
        formatter_class=RawDescriptionHelpFormatter,
    )
    explain.add_argument("target", metavar="package.module:function", help="or path/to/file.py:function")
    explain.add_argument("--step", action="store_true", help="the function is a step itself; do not call it before")
    explain.add_argument(
        "--option",
        dest="options",
        action="append",
        default=[],
        type=_option,
        metavar="name=value",
        help="an option of the backend, as memory_budget=40GiB or modules='{\"*.mlp\": False}'; any number of them",
    )
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    explain.add_argument("--plot", metavar="FILE", help="draw the memory of a step (.png, .svg, .pdf)")
    explain.set_defaults(run=_explain)
    doctor = commands.add_parser("doctor", help="check this machine: versions, compilers, a loop that is compiled")
    doctor.add_argument("--inner", default="inductor", choices=INNER, help="compiler of the loop that is tried")
    doctor.add_argument("--device", default=None, help="as torch names it; by default a GPU where there is one")
    doctor.set_defaults(run=_doctor)
    return parser


def _option(text: str) -> tuple[str, Any]:
    """Return the name and the value of name=value; the value is a Python literal, or else a string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"{text!r} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _explain(given: Namespace) -> int:
    try:
        report = explained(given.target, dict(given.options), step=given.step)
        print(report.to_json(indent=1) if given.json else report)
        if given.plot:
            report.plot(given.plot)
    except (ExplainError, ImportError, OSError, ValueError) as error:
        print(f"mst_fx: {str(error).removeprefix('mst_fx: ')}", file=sys.stderr)
        return 1
    return 0


def _doctor(given: Namespace) -> int:
    sound = True
    for check in examined(given.inner, given.device):
        print(check)
        sound = sound and check.status != "FAIL"
    return 0 if sound else 1
