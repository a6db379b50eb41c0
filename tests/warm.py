"""Starts the programs under test from a process that has imported torch, timm and DeepSpeed.

Importing them takes about nine CPU seconds, and a test of interruptions starts ten processes. So a
server forks the programs that `subprocess.Popen` would start as `python -m mae_scale`, as a
launcher or as a script of the tests; other programs start as always. A forked program is a process
of its own and a child of the process that asked for it: with the arguments, variables, folder, open
files, process group and signal handlers that the command would have had; /proc shows its arguments
and variables, too. Launchers, sweeps and the demo start their programs in the same way.

MAE_SCALE_TEST_COLD=1 in the environment starts everything as always.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import inspect
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil

LAUNCHERS = ("torch.distributed.run", "deepspeed.launcher.runner", "deepspeed.launcher.launch")
MODULES = ("mae_scale", *LAUNCHERS)
STARTING_OTHERS = (*LAUNCHERS, "demo.py", "gpu.py")  # beside `mae_scale sweep`
TESTS = Path(__file__).parent
SCRIPTS = (
    *(TESTS / name for name in ("unit", "integration", "slurm")),
    *(TESTS.parent / name for name in ("examples", "benchmarks")),
)
# Modules that programs import at first use, such as those with train.compile.
AT_FIRST_USE = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
)
# Variables that Python and its libraries read when they start.
AT_THE_START = ("PYTHON", "LD_", "OMP_", "MKL_", "LC_", "LANG", "MALLOC_", "ATEN_")
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
ROOM = " " * 16_384  # memory of the server for what /proc shows of the programs

cold = subprocess.Popen._execute_child  # type: ignore[attr-defined]
signature = inspect.signature(cold)
prctl = ctypes.CDLL(None, use_errno=True).prctl


class Server:
    """The server of this process, once it has been started."""

    connection: socket.socket | None = None
    lock = threading.Lock()  # a program may start others from several threads
    pid: int | None = None
    env: dict[str, str] | None = None  # environment with which it was started


def execute_child(self: Any, *args: Any) -> None:
    """Take the place of `subprocess.Popen._execute_child`: let the server fork what it can."""
    given = signature.bind(self, *args).arguments
    command, env = given["args"], given["env"]
    request = None if isinstance(command, (str, bytes)) else warm_request(list(command), env)
    if request is None or given["preexec_fn"] or given["pass_fds"] or given["shell"]:
        cold(self, *args)
        return
    request["cwd"] = str(Path(given["cwd"] or ".").resolve())
    request["session"] = given["start_new_session"]
    request["group"] = given["process_group"]
    pipes = (given["p2cread"], given["c2pwrite"], given["errwrite"])
    self.pid = ask(request, [fd if own == -1 else own for fd, own in enumerate(pipes)])
    self._child_created = True
    self._close_pipe_fds(
        *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread",
                                   "errwrite"))
    )  # fmt: skip


def warm_request(command: list[Any], env: dict[str, str] | None) -> dict[str, Any] | None:
    """Give what the server needs to know of a command, or None where it is not for the server."""
    words = [os.fspath(word) for word in command]
    env = dict(os.environ) if env is None else {**env}
    unbuffered = words[1:2] == ["-u"]
    rest = words[1 + unbuffered :]
    module = rest[:1] == ["-m"]
    if not rest[module:]:
        return None
    program, arguments = (rest[1], rest[2:]) if module else (rest[0], rest[1:])
    ours = program in MODULES if module else Path(program).parent in SCRIPTS
    if words[0] != sys.executable or not ours:
        return None
    if "MAE_SCALE_TEST_COLD" in env:
        return None
    known = dict(os.environ) if Server.env is None else Server.env
    if at_the_start(env) != at_the_start(known):
        return None
    return {
        "module": module, "program": program, "arguments": arguments,
        "env": env, "unbuffered": unbuffered,
    }  # fmt: skip


def at_the_start(env: dict[str, str]) -> dict[str, str]:
    """Give the variables that a forked process would read too late."""
    return {key: value for key, value in env.items() if key.startswith(AT_THE_START)}


def ask(request: dict[str, Any], files: list[int]) -> int:
    """Let the server fork a process whose parent is this one; give its id."""
    with Server.lock:
        if Server.connection is None:
            Server.connection = start_server()
        content = json.dumps(request).encode()
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process
        try:
            socket.send_fds(Server.connection, [len(content).to_bytes(4, "little")], files)
            Server.connection.sendall(content)
            answer = exactly(Server.connection, 4)
        finally:
            prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    if not answer:
        raise RuntimeError("the server that starts programs has died")
    return int.from_bytes(answer, "little")


def children() -> list[psutil.Process]:
    """Give the processes that descend from this one, without servers that fork others for tests."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if p.pid != Server.pid and not _is_of_multiprocessing(p)]


def _is_of_multiprocessing(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return False
    return "multiprocessing.forkserver" in words or "multiprocessing.resource_tracker" in words


def exactly(connection: socket.socket, size: int) -> bytes:
    """Read that many bytes; fewer where the other end is gone."""
    content = b""
    while len(content) < size and (piece := connection.recv(size - len(content))):
        content += piece
    return content


def start_server() -> socket.socket:
    """Start the server of this process; it ends when this process does."""
    ours, its = socket.socketpair()
    command = [sys.executable, __file__, str(its.fileno()), ROOM]
    process = subprocess.Popen(
        command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, "ROOM": ROOM}
    )
    its.close()
    Server.pid, Server.env = process.pid, dict(os.environ)

    def end(pid: int = os.getpid()) -> None:
        if os.getpid() == pid:  # not a fork of this process
            ours.close()
            process.wait()

    atexit.register(end)
    return ours


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request, undisturbed by signals to its process group.

    Returns:
        The request, in a forked process; None in the server, when nobody can ask any more.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # no program looks for garbage among what the server has imported
    while True:
        header, files, *_ = socket.recv_fds(connection, 4, 3)
        if not header:
            return None
        request = json.loads(exactly(connection, int.from_bytes(header, "little")))
        read, write = os.pipe()
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            if (pid := os.fork()) == 0:
                os.close(read)
                os.close(write)
                connection.close()
                while os.getppid() == middle:  # a program may ask at once who its parent is
                    time.sleep(0.001)
                return {**request, "files": files}
            os.write(write, pid.to_bytes(4, "little"))
            os._exit(0)
        os.waitpid(middle, 0)  # now the child has lost its parent
        connection.sendall(os.read(read, 4))
        for fd in (read, write, *files):
            os.close(fd)


def become(request: dict[str, Any]) -> NoReturn:
    """Give this process what the command would have had, run the program, and end."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python does at its start
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    elif request["group"] is not None and request["group"] >= 0:
        os.setpgid(0, request["group"])
    for fd, own in enumerate(request["files"]):
        os.dup2(own, fd)
    for own in request["files"]:
        os.close(own)
    os.environ.clear()
    os.environ.update(request["env"])
    show_in_proc(request)
    os.chdir(request["cwd"])
    if (rank := os.environ.get("RANK")) is not None:
        prctl(PR_SET_NAME, f"rank {rank}".encode(), 0, 0, 0)  # for runs.ranks
    whole_lines = not request["unbuffered"]
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = io.TextIOWrapper(
            os.fdopen(fd, "wb", buffering=-1 if whole_lines else 0, closefd=False),
            encoding="utf-8",
            errors="strict" if fd == 1 else "backslashreplace",
            line_buffering=fd == 2 or os.isatty(fd),
            write_through=not whole_lines,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    try:
        run(request)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise
        code = end.code or 0
    else:
        code = 0
    # As Python ends, without the second in which it would look through all that was imported.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request: dict[str, Any]) -> None:
    """Run the module or the script."""
    program = request["program"]
    if Path(program).name in STARTING_OTHERS or request["arguments"][:1] == ["sweep"]:
        start_a_launchers_server()
    if request["module"]:
        sys.path[0] = request["cwd"]
        sys.argv = ["-m", *request["arguments"]]
        sys.modules.pop(program if program in LAUNCHERS else f"{program}.__main__", None)
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program).parent)
        sys.argv = [program, *request["arguments"]]
        runpy.run_path(program, run_name="__main__")


def show_in_proc(request: dict[str, Any]) -> None:
    """Write arguments and variables to where /proc shows those of the server."""
    module = ["-m"] if request["module"] else []
    words = [sys.executable, *module, request["program"], *request["arguments"]]
    variables = [f"{key}={value}" for key, value in request["env"].items()]
    # Fields 48 to 51 of proc(5): where the arguments start and end, and the variables.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:49]
    places = [int(field) for field in fields]
    for texts, start, end in ((words, *places[:2]), (variables, *places[2:])):
        content = b"".join(os.fsencode(text) + b"\0" for text in texts)[: end - start - 1]
        ctypes.memmove(start, content.ljust(end - start, b"\0"), end - start)


def start_a_launchers_server() -> None:
    """Fork a server for the ranks while this process has no threads yet."""
    ours, its = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        if (request := serve(its)) is None:
            os._exit(0)
        become(request)
    its.close()
    Server.connection, Server.env = ours, dict(os.environ)
    # torchrun asks to which modules its callers belong, and Python would look in all for these two.
    for file in ("<frozen runpy>", __file__):
        inspect.modulesbyfile[str(Path(file).absolute())] = "runpy"  # type: ignore[attr-defined]
    install()


def install() -> None:
    """Let `subprocess.Popen` of this process start programs by the server."""
    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]


def import_all() -> None:
    """Import what the programs import."""
    for name in (*AT_FIRST_USE, *LAUNCHERS):
        importlib.import_module(name)
    import mae_scale

    for module in pkgutil.walk_packages(mae_scale.__path__, "mae_scale."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


if __name__ == "__main__":
    import_all()
    if not (asked := serve(socket.socket(fileno=int(sys.argv[1])))):
        os._exit(0)
    become(asked)
