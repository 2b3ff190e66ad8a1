"""Answer questions about this machine, or another one, on the command line.

stdout carries only the answer and stderr everything else, so that both can be piped. Neither torch
(but for `hal quantize`, which computes) nor Triton is imported, and nothing but the parts that a
command needs; `hal verify` computes in child processes.

Exit status: 0 answered; 1 answered, and no kernel can run, or one that ran is wrong; 2 not
answered, because a name, a size or a setting cannot be used or the answer could not be written.
`hal doctor` has statuses of its own, by severity.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hal import __version__
from hal.bench_command import add_bench
from hal.errors import HalError, SettingError, UnknownNameError
from hal.matrix_command import add_matrix
from hal.plan_command import add_plan
from hal.quantize_command import add_quantize
from hal.tune_command import add_tune
from hal.verify_command import add_verify

if TYPE_CHECKING:
    from hal.device import DeviceSpec
    from hal.protocol import Platform

__all__ = ["main"]

OK, NO_KERNEL, USAGE = 0, 1, 2
INTERRUPTED = 130  # as shells report a program that Ctrl-C ended

_EXPLAIN_EPILOG = """\
Sizes are written name=value. Those that are not given are listed as unchecked.
  hal explain linear --scheme fp8_channel tokens=16 in_features=4096
  hal explain fused_moe --scheme fp8_block128 --platform rocm:mi300x
"""

_DOCTOR_EPILOG = """\
Exit status: 0 nothing or notes, 1 warnings, 3 errors, 2 the question itself was at fault.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            return _run(arguments)
        except HalError as error:
            _complain(error)
            return USAGE
        except BrokenPipeError:  # the reader has seen enough, as with `hal info | head`
            _forget_stdout()
            return OK
        except OSError as error:
            _complain(f"cannot write the answer: {error.strerror or error}")
            _forget_stdout()
            return USAGE
        except KeyboardInterrupt:
            return INTERRUPTED


def _run(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise UnknownNameError("command", arguments[0], COMMANDS)
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        # argparse does not take positional arguments on both sides of an option
        sizes = [text for text in rest if not text.startswith("-")]
        if len(sizes) < len(rest) or (rest and options.command not in TAKING_SIZES):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as leaving:  # argparse has printed help, the version or what is wrong
        return OK if leaving.code in (None, 0) else USAGE
    if rest:
        options.sizes = [*options.sizes, *sizes]
    _log_to_stderr()
    if options.command is None:
        parser.print_help()
        return OK
    status: int = COMMANDS[options.command](options)
    return status


def _info(options: argparse.Namespace) -> int:
    from hal.describe import info_sections
    from hal.report import info_report
    from hal.runtime import refresh, resolve_platform

    if options.deep:
        from hal.config import import_seconds
        from hal.software import find_software
        from hal.trials import try_kernel_packages

        try_kernel_packages(find_software(), import_seconds())
        refresh()
    report = info_report(resolve_platform(options.platform))
    if options.json:
        _write_json(report)
        return OK
    from hal.render import to_markdown, to_text

    sections = info_sections(report)
    _write(to_markdown(sections) if options.markdown else to_text(sections, color=_color()))
    return OK


def _explain(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from hal.report import explain_report
    from hal.runtime import resolve_platform
    from hal.selection import choose, options_from
    from hal.size_texts import sizes_of

    scheme = options.scheme or _only_scheme(options.op)
    platform = resolve_platform(options.platform)
    insists = options_from(
        options.op,
        minimum=options.minimum,
        force=options.force,
        batch_invariant=options.batch_invariant,
        deterministic=options.deterministic,
    )
    if options.force is not None:
        insists = replace(insists, force_origin="--force")
    problem = sizes_of("explain", options.op, options.sizes)
    selections = [
        choose(options.op, scheme, spec, problem, insists)
        for spec in _one_of_each_kind(platform, options.device)
    ]
    reports = [explain_report(selection, platform) for selection in selections]
    if options.json:
        _write_json(reports[0] if len(reports) == 1 else reports)
    else:
        from hal.describe import explain_text

        texts = [
            explain_text(report, str(selection), color=_color(), markdown=options.markdown)
            for report, selection in zip(reports, selections, strict=True)
        ]
        _write("\n".join(texts))
    able = all(each.kernel is not None and not each.refused for each in selections)
    return OK if able else NO_KERNEL


def _one_of_each_kind(platform: Platform, index: int | None) -> list[DeviceSpec]:
    """Return the facts of the device asked for, or of every kind of device that is visible."""
    if index is not None:
        return [platform.device(index)]
    specs = [platform.device(each) for each in range(platform.device_count())]
    return list(dict.fromkeys(spec.kind for spec in specs))


def _doctor(options: argparse.Namespace) -> int:
    from hal.config import import_seconds
    from hal.doctor import doctor_report, doctor_sections, subject_here

    seconds = None if options.quick else import_seconds()
    report = doctor_report(subject_here(), seconds=seconds, said=_progress)
    if options.json:
        _write_json(report)
    else:
        from hal.render import to_markdown, to_text

        sections = doctor_sections(report)
        _write(to_markdown(sections) if options.markdown else to_text(sections, color=_color()))
    status: int = report["status"]
    return status


def _progress(title: str) -> None:
    """Say on a terminal what takes time."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"hal: trying {title} ...", file=sys.stderr)


def _quantize(options: argparse.Namespace) -> int:
    from hal.quantize_command import quantize_answer

    return _give(quantize_answer(options))


def _verify(options: argparse.Namespace) -> int:
    from hal.verify_command import verify_answer

    answer, status = verify_answer(options)
    _give(answer)
    return status


def _plan(options: argparse.Namespace) -> int:
    from hal.plan_command import plan_answer

    return _give(plan_answer(options))


def _tune(options: argparse.Namespace) -> int:
    from hal.tune_command import tune_answer

    return _give(tune_answer(options))


def _bench(options: argparse.Namespace) -> int:
    from hal.bench_command import bench_answer

    return _give(bench_answer(options))


def _give(answer: Any) -> int:
    """Write an object as JSON, or sections as text."""
    from hal.render import to_text

    if isinstance(answer, dict):
        _write_json(answer)
    else:
        _write(to_text(answer, color=_color()))
    return OK


def _matrix(options: argparse.Namespace) -> int:
    from hal.matrix_command import matrix_answer

    _write(matrix_answer(options, color=_color()))
    return OK


TAKING_SIZES = ("explain", "bench", "tune")
COMMANDS = {
    "info": _info,
    "explain": _explain,
    "doctor": _doctor,
    "quantize": _quantize,
    "matrix": _matrix,
    "bench": _bench,
    "tune": _tune,
    "plan-ep": _plan,
    "verify": _verify,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hal", description="Say what this machine has, what would run on it, and why."
    )
    parser.add_argument("--version", action="version", version=f"hal {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--platform",
        metavar="SPEC",
        help="a platform or a device instead of what is here, such as cuda:h100 or rocm:gfx942",
    )
    forms = argparse.ArgumentParser(add_help=False)
    form = forms.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown, for bug reports")
    info = commands.add_parser(
        "info",
        parents=[shared, forms],
        help="devices, software, probes, and what each op would run",
    )
    info.add_argument(
        "--deep", action="store_true", help="first import each kernel package, in a child process"
    )
    doctor = commands.add_parser(
        "doctor",
        parents=[forms],
        help="what does not fit together on this machine, and what cures it",
        epilog=_DOCTOR_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "--quick", action="store_true", help="compare facts alone and start no child process"
    )
    explain = commands.add_parser(
        "explain",
        parents=[shared, forms],
        help="which kernel one op would run, and what each of the others lacks",
        epilog=_EXPLAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("op", metavar="OP", help="name of an op, such as linear")
    explain.add_argument(
        "--scheme", metavar="S", help="such as fp8_channel; not needed where an op has only one"
    )
    explain.add_argument(
        "--device", metavar="I", type=int, default=None, help="visible device index"
    )
    explain.add_argument("--force", metavar="KERNEL", help="this kernel or none")
    explain.add_argument("--minimum", metavar="LEVEL", help="lowest level, such as weight_only")
    explain.add_argument(
        "--batch-invariant",
        action="store_true",
        help="only kernels that give a token the same bits whatever is beside it",
    )
    explain.add_argument(
        "--deterministic",
        action="store_true",
        help="only kernels that give equal bits for equal input",
    )
    # A default, or argparse calls sizes required.
    explain.add_argument(
        "sizes", metavar="SIZE=VALUE", nargs="*", default=[], help="such as hidden=4096"
    )
    add_quantize(commands)
    add_matrix(commands)
    add_plan(commands, [shared])
    add_verify(commands)
    add_bench(commands, shared)
    add_tune(commands, shared)
    return parser


def _only_scheme(op: str) -> str:
    """Return the scheme of an op that has one.

    Raises:
        SettingError: If it has several.
    """
    from hal.registry import find_op

    schemes = sorted({scheme for kernel in find_op(op).kernels for scheme in kernel.schemes})
    if len(schemes) != 1:
        raise SettingError(f"explain {op}", found="no --scheme", needed=" or ".join(schemes))
    return schemes[0]


def _write_json(report: Any) -> None:
    import json

    _write(json.dumps(report, indent=2) + "\n")


def _write(text: str) -> None:
    """Write the answer, in ASCII: no locale and no pipe can then refuse it."""
    if sys.stdout is not None:  # None where the shell closed it
        sys.stdout.write(text)
        sys.stdout.flush()


def _color() -> bool:
    from hal.config import uses_color

    return sys.stdout is not None and uses_color(sys.stdout.isatty())


def _complain(problem: object) -> None:
    if sys.stderr is not None:
        text = str(problem).encode("ascii", "backslashreplace").decode("ascii")
        print(f"hal: {text}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    _complain(f"warning: {message}")


def _log_to_stderr() -> None:
    """Show the records of the logger `hal` from the level HAL_LOG on, else warnings and above."""
    from hal.config import setting

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("hal: %(levelname)s: %(message)s"))
    logger = logging.getLogger("hal")
    logger.handlers[:] = [handler]
    logger.setLevel((setting("HAL_LOG") or "warning").upper())


def _forget_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush cannot fail either."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # no file behind it
        pass
