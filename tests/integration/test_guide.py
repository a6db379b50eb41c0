"""The commands of the guide and of the other pages, as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mae_scale.cli import COMMANDS, main
from mae_scale.data.shards import open_shards
from mae_scale.tasks.task import TASKS

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md",
         *sorted((REPOSITORY / "docs").glob("*.md"))]  # fmt: skip
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


WRITTEN = (
    "report.html",
    "reconstructions.png",
    "results.json",
    "export/mae.pth",
    "export/mae-hf/model.safetensors",
    "export/finetuned-timm/model.safetensors",
)


def blocks(page: Path, language: str) -> list[str]:
    """Give the code blocks of a language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def workplace(folder: Path) -> Path:
    """Make a folder that holds what a checkout holds and has a space in its path."""
    folder.mkdir()
    for name in ("data_prep", "examples", "slurm", "benchmarks"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


STARTED_WARM = {"mae-scale": ["-m", "mae_scale"], "torchrun": ["-m", "torch.distributed.run"]}


def run_line(line: str, place: Path, cold: set[str]) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell block in a folder.

    The shell runs it as it stands, except that a program which the shell has started once already
    is started as its module later, so that tests/warm.py can spare it its imports.

    Args:
        line: one command of the block.
        place: folder in which it runs.
        cold: programs that the shell has started already; this one is added.
    """
    words = shlex.split(line, comments=True)
    if words[0] in STARTED_WARM and words[0] in cold:
        command = [sys.executable, *STARTED_WARM[words[0]], *words[1:]]
    else:
        command = ["bash", "-euo", "pipefail", "-c", line]
        cold.add(words[0])
    return subprocess.run(
        command, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )


@pytest.mark.timeout(1200)
def test_the_guide_word_by_word(tmp_path: Path) -> None:
    """Every command of docs/guide.md works, in order, in an empty folder."""
    place = workplace(tmp_path / "empty folder")
    cold: set[str] = set()
    for block in blocks(REPOSITORY / "docs" / "guide.md", "bash"):
        for line in block.replace("\\\n", "").splitlines():
            done = run_line(line, place, cold)
            assert done.returncode == 0, line + done.stdout + done.stderr
            assert "Traceback" not in done.stderr
    for name in WRITTEN:
        assert (place / "guide" / name).stat().st_size > 100, name
    runs = " ".join(f"guide/runs/{name}" for name in ("mae", "finetuned", "probe"))
    again = run_line(f"mae-scale status {runs}", place, cold)
    assert again.stdout.count("finished") == 3
    assert cold == {"python", *STARTED_WARM}


# Each program of the arguments gets a process of its own, which need not import torch again.
EACH_IN_A_PROCESS = """
import os, sys, torch, timm
for program in sys.argv[1:]:
    if (pid := os.fork()) == 0:
        exec(compile(program, "a page", "exec"), {"__name__": "__main__"})
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        sys.exit("it failed: " + program)
"""


def test_the_python_of_the_pages(shards: Path) -> None:
    """Each code block works in a process of its own and does not import DeepSpeed."""
    found = []
    for page in PAGES:
        for code in blocks(page, "python"):
            if "SHARDS" not in code and "mae_scale" not in code:
                continue  # lines of timm and transformers: test_export.py runs them
            code = code.replace("SHARDS/train", str(shards))
            found.append(code + "\nimport sys\nassert 'deepspeed' not in sys.modules")
    assert len(found) >= 5
    subprocess.run([sys.executable, "-c", EACH_IN_A_PROCESS, *found], check=True)
    alone = "import sys, mae_scale; assert 'torch' not in sys.modules, 'slow'; dir(mae_scale)"
    subprocess.run([sys.executable, "-c", alone], check=True)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of a page, without brackets and ellipses."""
    for block in blocks(page, "bash"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if line.startswith((" ", "\t")) or "| " in line:
                continue  # inside of a loop, or a filter
            text = line.replace("…", "").replace("[", "").replace("]", "")
            with suppress(ValueError):
                for command in text.split("&&"):
                    if words := shlex.split(command, comments=True):
                        yield words


def own_command(words: list[str]) -> list[str] | None:
    """Give the arguments of `mae-scale`, whatever launches it, or None for another command."""
    if "mae_scale" in words[1:]:
        return words[words.index("mae_scale", 1) + 1 :]
    if "mae-scale" in words and words[0] in ("mae-scale", "srun"):
        return words[words.index("mae-scale") + 1 :]
    templates = [i for i, word in enumerate(words) if re.fullmatch(r"slurm/\w+\.sbatch", word)]
    if words[0] == "sbatch" and templates:
        at = templates[0]
        assert (REPOSITORY / words[at]).is_file(), words
        name = Path(words[at]).stem
        return [name, *words[at + 1 :]] if name in (*TASKS, *COMMANDS) else None
    return None


MISSING = (  # messages of a command that was read whole and lacks its input
    "does not exist", "no file or folder", "neither a run folder", "no run folder", "is no folder",
    "is no run", "there is no", "arguments are required", "is neither a file nor a recipe",
    "holds no",
)  # fmt: skip
# Settings for two steps of a narrow model, with the same heads for all sizes.
SHRUNK = {
    "model.embed_dim": 96, "model.num_heads": 8, "model.depth": 2, "train.global_batch_size": 4,
    "train.micro_batch_size": 2, "train.max_steps": 2, "data.workers": 0, "train.log_every": 1,
}  # fmt: skip
DECODER = {"model.decoder_embed_dim": 32, "model.decoder_depth": 1}
TRAINING = ("pretrain", "finetune", "linprobe")
WORKED = {  # tasks of a page that must have done their work
    "README": {"plan", "pretrain", "finetune", "status", "report", "reconstruct", "evaluate",
               "export"},
    "finetuning": {"finetune", "linprobe", "evaluate"}, "slurm": {"pretrain"},
    "training": {"reconstruct"}, "export": {"export"}, "watching": {"status", "report"},
    "scaling": {"plan"},
}  # fmt: skip


def train(task: str, *arguments: str) -> tuple[int, str]:
    """Train a shrunk model in a process of its own; give the exit code and the output on stderr."""
    shrunk = SHRUNK | (DECODER if task == "pretrain" else {})
    words = [*arguments, *(f"--{key}={value}" for key, value in shrunk.items())]
    command = [sys.executable, "-m", "mae_scale", task, *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


def option(words: list[str], name: str) -> Path | None:
    """Give the path after an option, or None where the option is not there."""
    return Path(words[words.index(name) + 1]) if name in words else None


def test_the_commands_of_all_pages(
    shards: Path,
    val_shards: Path,
    imagenet_tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each command works, or its error is a missing path and not an option that is wrong.

    Each page has a folder of its own with the inputs of its commands. Commands that train have a
    shrunk model and one process, without the launcher.
    """
    monkeypatch.setattr("mae_scale.launch.stopping.catch_signals_early", lambda: None)
    monkeypatch.chdir(tmp_path)
    pretrained = tmp_path / "pretrained"
    words = ["--config=pretrain_vit_large", f"--data.train={shards}", f"--run_dir={pretrained}"]
    assert train("pretrain", *words)[0] == 0
    photographs = next(imagenet_tree.iterdir())
    given = {
        "shards/train": shards, "SHARDS/train": shards,
        "shards/val": val_shards, "SHARDS/val": val_shards,
        "RUN": pretrained, "RUN_OR_FILE": pretrained, "RUN_OR_STEP_FOLDER": pretrained,
        "photographs/": photographs, "IMAGES_OR_FOLDERS": photographs,
    }  # fmt: skip
    worked: dict[str, set[str]] = {page.stem: set() for page in PAGES}
    read, wrong = 0, []
    for page in PAGES:
        place = workplace(tmp_path / page.stem)
        monkeypatch.chdir(place)
        for words in commands(page):
            arguments = own_command(words)
            if arguments is None or arguments[:1] == ["COMMAND"]:
                check_other(words)
                continue
            # /data/shards and /runs of README and slurm.md, in this folder
            arguments = [re.sub("^(val=)?/(data/)?", r"\1", word) for word in arguments]
            task, code, error = arguments[0], 0, ""
            if task != "sweep":  # a sweep has full-size runs, which nothing shrinks
                make_room(arguments, given)
            data = option(arguments, "--data.train")
            if task in TRAINING and data is not None and data.exists():
                code, error = train(task, *arguments[1:])
            else:
                with suppress(SystemExit):  # --help exits
                    code = main(arguments)
                error = capfd.readouterr().err.strip()
            if code and (code != 2 or not any(text in error for text in MISSING)):
                wrong.append(f"{page.name}: {shlex.join(words)}\n{error}")
            read += 1
            if code == 0:
                worked[page.stem].add(task)
    assert not wrong, "\n".join(wrong)
    idle = {page: tasks - worked[page] for page, tasks in WORKED.items()}
    assert not any(idle.values()), idle
    assert read > 50


def make_room(arguments: list[str], given: dict[str, Path]) -> None:
    """Put the inputs of a command where it looks for them, and remove what it is to write."""
    made = option(arguments, "--run_dir")
    if made is not None and made.is_symlink():
        made.unlink()
    elif made is not None and made.exists():
        shutil.rmtree(made)
    for word in arguments[1:]:
        name = word.split("=")[-1]
        path = Path(name)
        if name in given and path != made and not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.symlink_to(given[name])


def check_other(words: list[str]) -> None:
    """Check that scripts of the repository exist and know their options, and that make targets
    exist."""
    scripts = [
        word for word in words if re.fullmatch(r"(data_prep|examples|benchmarks)/\S+\.py", word)
    ]
    for script in scripts:
        assert (REPOSITORY / script).is_file(), words
        text = (REPOSITORY / script).read_text()
        for called in re.findall(r"mae_scale\.(commands\.\w+|sharding\.\w+_script)", text):
            text += (REPOSITORY / "mae_scale" / f"{called.replace('.', '/')}.py").read_text()
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        for option in options:
            assert f'"{option}"' in text or f"'{option}'" in text, (option, words)
    if words[0] == "make":
        targets = (REPOSITORY / "Makefile").read_text()
        for word in words[1:]:
            assert "=" in word or f"\n{word}:" in targets, words


def bash_block(page: str, containing: str) -> str:
    """Give the block of shell commands on a page of docs/ that contains a text."""
    (block,) = [b for b in blocks(REPOSITORY / "docs" / page, "bash") if containing in b]
    return block


def test_pets_become_shards(imagenet_tree: Path, tmp_path: Path) -> None:
    """The commands of the page work on images and lists in the layout of Oxford-IIIT Pets."""
    pets = tmp_path / "oxford-iiit-pet"
    for name in ("images", "annotations"):
        (pets / name).mkdir(parents=True)
    (tmp_path / "data_prep").symlink_to(REPOSITORY / "data_prep")
    photographs = iter(sorted(imagenet_tree.rglob("*.JPEG")))
    for split, numbers in (("trainval", (1, 20)), ("test", (3, 100))):
        names = [f"{breed}_{n}" for breed in ("Abyssinian", "great_pyrenees") for n in numbers]
        for name in names:
            shutil.copyfile(next(photographs), pets / "images" / f"{name}.jpg")
        lines = [f"{name} 1 1 1\n" for name in names]
        (pets / "annotations" / f"{split}.txt").write_text("".join(lines))
    sharding = bash_block("finetuning.md", "oxford-iiit-pet").partition("mae-scale")[0]
    sharding = sharding.replace("/data/", f"{shlex.quote(str(tmp_path))}/")
    subprocess.run(["bash", "-euc", sharding], cwd=tmp_path, env=ENVIRONMENT, check=True)
    for split in ("train", "val"):
        shards = open_shards(tmp_path / "SHARDS" / split)
        assert len(shards) == 4 and len(shards.classes) == 2
