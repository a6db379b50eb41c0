"""The command line: `mae-scale COMMAND …`, also `python -m mae_scale COMMAND …`."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import traceback
from typing import NoReturn

from mae_scale import __version__
from mae_scale.commands import COMMANDS
from mae_scale.errors import CommonError, RunError, UserError, did_you_mean
from mae_scale.files import TRUST_INDEX, TRUST_PICKLE
from mae_scale.launch.outputs import one_line, take_over
from mae_scale.launch.stopping import catch_signals_early
from mae_scale.tasks.task import TASKS
from mae_scale.tasks.task import main as train
from mae_scale.world import World

# Commands whose product is what they print: where stdout fails, they fail.
PRINTING = {"plan", "status", "help", "--help", "-h", "--version", "-V"}


TRUSTS = (TRUST_PICKLE, TRUST_INDEX)


def usage() -> str:
    """Compose the text of `mae-scale --help`."""
    about = {**{task.name: task.about for task in TASKS.values()}, **COMMANDS}
    lines = [f"  {name:<13} {text}" for name, text in about.items()]
    return "\n".join(
        [
            "usage: mae-scale COMMAND [options]",
            "",
            "Masked Autoencoders from ViT-B to ViT-H on clusters.",
            "",
            "commands:",
            *lines,
            "",
            "mae-scale COMMAND --help explains every option and config key.",
            *(f"Any command takes {t.option}: it lets {t.meaning}." for t in TRUSTS),
            "Without it such files are refused; give it only where you know who made them.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 (done), 85 (stopped early), 2 (bad input) or 1."""
    argv = sys.argv[1:] if argv is None else argv
    # DeepSpeed's launcher adds --local_rank=N; the rank is read from the environment instead.
    argv = [token for token in argv if not token.startswith(("--local_rank=", "--local-rank="))]
    for trust in TRUSTS:
        if trust.option in argv:
            os.environ[trust.variable] = "1"
            argv = [token for token in argv if token != trust.option]
    name = argv[0] if argv else "--help"
    if name == "help" and argv[1:]:
        name, argv = argv[1], [argv[1], "--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if name in ("-V", "--version"):
        print(f"mae-scale {__version__}")
        return 0
    try:
        if "--trust" in argv:
            raise UserError(
                "--trust is two options: "
                + "; ".join(f"{t.option} lets {t.meaning}" for t in TRUSTS)
            )
        if name in TASKS:
            return train(name, argv[1:], f"mae-scale {name}")
        if name not in COMMANDS:
            known = [*TASKS, *COMMANDS]
            hint = did_you_mean(name, known)
            raise UserError(f"unknown command '{name}'; {hint} commands: {', '.join(known)}")
        module = importlib.import_module(f"mae_scale.commands.{name}")
        return module.main(argv[1:], f"mae-scale {name}")
    except (UserError, RunError) as error:
        try:
            world = World.from_environment()
        except UserError:  # this is the error, and each process may have another one
            world = World()
        if isinstance(error, UserError) and name in TASKS and world.size > 1:
            from mae_scale.launch.distributed import agreed

            error = agreed(world, error)
        # An error that all ranks raise is printed by rank 0 only; any other by the rank it struck.
        if world.rank == 0 or not isinstance(error, (UserError, CommonError)):
            print(f"mae-scale: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def entry() -> NoReturn:
    """Run `main` as the program, and end the process with its exit code.

    After training the process ends without finalising Python. A thread of gloo may still hold the
    tensors of a collective that is long done; to drop them it needs the GIL, and asking a
    finalising interpreter for that ends the thread inside a C++ destructor, which aborts the
    process ("terminate called without an active exception"). Destroying the process group does
    not end those threads, since DeepSpeed keeps references to it.
    """
    prints = not sys.argv[1:] or sys.argv[1] in PRINTING
    if next((word for word in sys.argv[1:] if not word.startswith("-")), None) in TASKS:
        catch_signals_early()
    take_over(drops=not prints)
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:  # only commands that do not train raise it
        print("mae-scale: interrupted", file=sys.stderr)
        code = 130  # the code that shells use for it
    except SystemExit as end:  # --help raises it
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except OSError as error:
        if not prints:
            traceback.print_exc()
        elif not isinstance(error, BrokenPipeError):  # a reader that has closed has seen enough
            print(f"mae-scale: error: {one_line(error)}", file=sys.stderr)
        code = 1
    except Exception:
        traceback.print_exc()
        code = 1
    take_over()  # from now on nothing may change the exit code
    if "mae_scale.launch.distributed" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
