"""Outputs that cannot be written are dropped; each kind is tried in processes of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_scale.launch.outputs import one_line, printable

# This program prints, logs, shows a bar and raises in a thread, as a run does. At its end it writes
# a file, which no failing output may prevent.
PROGRAM = """
import logging, sys, threading, warnings
from mae_scale.launch.outputs import take_over
take_over()
from tqdm import tqdm
from mae_scale.launch.console import say, warn
from mae_scale.launch.logs import set_up_logging
from mae_scale.world import World
set_up_logging(World())
logging.basicConfig(stream=sys.stderr)
file = open(sys.argv[1], "w")
for number in tqdm(range(50), file=sys.stderr, mininterval=0):
    print("x" * 3000)
    logging.getLogger("mae_scale").info("line %d", number)
    logging.getLogger("other").warning("line")
say("a line")
warn("\\udcff\\u2603 a name that no locale has")
warnings.warn("careful")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(), thread.join()
sys.stdout.flush(), sys.stderr.flush(), sys.stdout.isatty()
file.write("done"), file.close()
sys.exit(85)
"""


def run(tmp_path: Path, redirection: str = "", **options: object) -> str:
    """Run a command in a shell, and give what it printed, if that can be read."""
    end = tmp_path / "end"
    with subprocess.Popen(
        ["bash", "-c", f'exec "$0" -c "$1" "$2" {redirection}', sys.executable, PROGRAM, end],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options},  # type: ignore[call-overload]
    ) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 85, output
    assert end.read_text() == "done"
    return output.decode() if output else ""


@pytest.mark.parametrize(
    "redirection",
    [
        ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1",
        ">/dev/null 2</dev/null", "1</dev/null", "> >(exit) 2>&1", "2> >(head -c 5 >&2)",
    ],
)  # fmt: skip
def test_an_output_that_takes_nothing(tmp_path: Path, redirection: str) -> None:
    run(tmp_path, redirection)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    run(tmp_path, f"> '{tmp_path}/log' 2>&1 < <(ulimit -f 8; :)")
    limit = "ulimit -f 20;"
    end = tmp_path / "end"
    command = f"{limit} \"$0\" -c \"$1\" '{end}' > '{tmp_path}/log' 2>&1"
    process = subprocess.run(["bash", "-c", command, sys.executable, PROGRAM], timeout=60)
    assert process.returncode == 85
    assert (tmp_path / "log").stat().st_size == 20 * 1024


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(descriptor)


@pytest.mark.slow
def test_a_pipe_that_nobody_reads(tmp_path: Path, pipe: tuple[int, int]) -> None:
    run(tmp_path, stdout=pipe[1])  # 64 kB fit into it


@pytest.mark.slow
def test_a_pipe_that_somebody_has_made_non_blocking(tmp_path: Path, pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    run(tmp_path, stdout=pipe[1])


def test_a_terminal_that_is_gone(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    os.close(master)
    run(tmp_path, stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)


def test_what_can_be_written_is(tmp_path: Path) -> None:
    output = run(tmp_path, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert output.count("x" * 3000) == 50
    assert "line 49" in output
    assert "\\udcff\\u2603 a name that no locale has" in output
    assert "ZeroDivisionError" in output
    assert "50/50" in output


def test_a_file_does_not_get_the_number_of_a_closed_output(tmp_path: Path) -> None:
    run(tmp_path, ">&- 2>&-")
    assert (tmp_path / "end").read_text() == "done"  # none of the printed lines


@pytest.mark.slow
def test_a_command_whose_product_is_its_output_says_that_it_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mae_scale", "--help"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1
    assert process.stderr == "mae-scale: error: [Errno 28] No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (process.returncode, process.stderr) == (1, "")


def test_names_move_no_cursor() -> None:
    name = "a\x1b]0;owned\x07b\r\n\x9b2J\u202e\x00\udcff"
    assert one_line(name) == r"a\x1b]0;owned\x07b\r\n\x9b2J\u202e\x00\udcff"
    assert printable("a\tb\r\n\x1b[A\x1b[5mc\x07") == "a\tb\r\n\x1b[A\\x1b[5mc\\x07"


def test_an_error_is_one_line_without_control_characters(tmp_path: Path) -> None:
    name = "no\x1b[2J\nmae-scale: such command"
    process = subprocess.run(
        [sys.executable, "-m", "mae_scale", name], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and r"no\x1b[2J\nmae-scale" in process.stderr


def test_an_interrupt_is_not_lost(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """A process that waits for a reader can be stopped."""
    program = "from mae_scale.launch.outputs import take_over; take_over(drops=False)\n"
    program += "while True: print('x' * 5000)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe[1])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
