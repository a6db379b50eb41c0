"""The parser of the commands that have no config, and the options that several of them share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from mae_scale.config.sizes import ImageSize, plain_size
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.errors import UserError, did_you_mean
from mae_scale.world import World, data_workers

# Option for each name that other programs have for it.
HABITS = {
    "bs": "batch_size",
    "image_size": "img_size",
    "input_size": "img_size",
    "num_workers": "workers",
    "j": "workers",
    "output": "out",
    "output_dir": "out",
    "out_dir": "out",
    "outdir": "out",
    "o": "out",
    "format": "to",
    "arch": "model",
    "model_name": "model",
    "k": "neighbours",
    "topk": "top",
    "threshold": "score",
    "n": "most",
}


def image_size(text: str) -> ImageSize:
    """Read a size of images: `224`, or height and width as `224x448` or `[224, 448]`.

    Raises:
        argparse.ArgumentTypeError: the text is something else.
    """
    found = re.fullmatch(r"\[?\s*(\d{1,6})(?:\s*[x,]\s*(\d{1,6}))?\s*\]?", text.strip())
    both = [int(side) for side in found.groups(found[1])] if found else [0]
    if min(both) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size of images; expected pixels such as 224, or height and width such "
            "as 224x448"
        )
    return plain_size(both)


def number(
    least: float, most: float = float("inf"), kind: type = float, open_at: tuple[float, ...] = ()
) -> Callable[[str], Any]:
    """Return a type for `add_argument`: a number in a range.

    Args:
        least, most: ends of the range.
        kind: int or float.
        open_at: ends that do not belong to the range.
    """
    words = f"at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
    words += "".join(f", {end:g} excluded" for end in open_at)

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} must be {name}, {words}") from None
        if not least <= value <= most or value in (*open_at, float("inf")):
            raise argparse.ArgumentTypeError(f"{text} must be {words}")
        return value

    return read


def whole(least: int) -> Callable[[str], int]:
    """Return a type for `add_argument`: a whole number of at least `least`."""
    return number(least, kind=int)


def file_name(*endings: str) -> Callable[[str], Path]:
    """Return a type for `add_argument`: a path with one of some endings."""

    def read(text: str) -> Path:
        if Path(text).suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(endings)}")
        return Path(text)

    return read


class Parser(argparse.ArgumentParser):
    """The parser of argparse, with errors as `UserError`s of one line, which end with exit code 2.

    Options cannot be abbreviated: an option that is added later must not change the meaning of a
    script.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, after a check that no argument is empty."""
        for number, word in enumerate(args or []):
            if re.fullmatch(r"(--[\w.-]+=)?\s*", word):
                before = " ".join([self.prog, *args[:number], word]).rstrip()
                self.error(f"the argument at the end of '{before}' is empty; is a variable unset?")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`, with a hint where an option is not known."""
        if found := re.match(r"unrecognized arguments: (-\S+)", message):
            word = found[1].lstrip("-").partition("=")[0].replace("-", "_")
            known = [o.lstrip("-") for action in self._actions for o in action.option_strings]
            same = [option for option in known if option.replace("-", "_") == word]
            habit = HABITS.get(word)
            if same or habit in known:
                message += f"; did you mean '--{same[0] if same else habit}'?"
            else:
                options = [f"--{option}" for option in known]
                message += f"; {did_you_mean(f'--{word}', options, f'see {self.prog} --help', 0.6)}"
        elif message.startswith("the following arguments are required"):
            message += f"; {self.prog} --help explains them"
        raise UserError(message)


def add_weights(parser: Parser, runs: str, foreign: str = "", classes: bool = False) -> None:
    """Add the weights of a trained model, and the options that say what it is.

    Args:
        parser: parser to add them to.
        runs: tasks whose runs the command takes.
        foreign: kind of weights from elsewhere that it takes.
        classes: whether the command uses the names of classes.
    """
    add = parser.add_argument
    add(
        "weights",
        type=Path,
        help=f"run folder of {runs} (its checkpoint with the best validation is taken, or else the "
        f"newest), a step folder in it, or weights{foreign}: an export, a .pth of the authors, a "
        ".safetensors, a folder of timm or Hugging Face",
    )
    add("--ema", action="store_true", help="take the moving average of the weights")
    add(
        "--model",
        help="architecture of weights that do not say it, such as mae_vit_base_patch16",
    )
    add("--num_heads", type=whole(1), help="attention heads of weights that do not say it")
    if classes:
        add(
            "--classes",
            help="classes of the outputs of weights that do not say it: shard folder, JSON list, "
            "or text with a name in each line",
        )


def add_pool(parser: Parser) -> None:
    """Add the option for the features that describe an image."""
    parser.add_argument(
        "--pool",
        choices=["token", "mean"],
        help="features that describe an image: the class token, or the mean of the patches; "
        "default: the token of a pre-trained model, what the head sees of a classifier",
    )


def add_img_size(parser: Parser, more: str = "") -> None:
    """Add the option for another size of images."""
    parser.add_argument(
        "--img_size",
        type=image_size,
        help="side of the images in pixels, or height and width such as 224x448; default: that of "
        f"the weights{more}",
    )


def add_images(parser: Parser, most: int | None = None) -> None:
    """Add image files, and where there is a largest number of them, its option."""
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    if most is not None:
        parser.add_argument(
            "--most",
            type=whole(1),
            default=most,
            help="number of images at the most (default: %(default)s)",
        )


def add_max_pixels(parser: Parser) -> None:
    """Add the option for the largest image."""
    parser.add_argument(
        "--max_pixels",
        type=whole(1),
        help="refuse larger images; default: data.max_pixels of the run, or for weights from "
        f"elsewhere {MAX_PIXELS}",
    )


def add_loading(parser: Parser) -> None:
    """Add the options of commands that read shards in batches."""
    add = parser.add_argument
    add_img_size(parser)
    add(
        "--crop_ratio",
        type=number(0, 1, open_at=(0,)),
        help="share of the short side that the centre crop covers; default: that of the weights, "
        "or 0.875 up to 224 pixels and 1.0 above",
    )
    add("--batch_size", type=whole(1), default=64, help="images per rank (default: %(default)s)")
    add(
        "--workers",
        type=whole(0),
        default=data_workers(),
        help="data-loading processes per rank (default: one less than its CPUs, 16 at the most)",
    )
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    add("--cache_dir", help="folder into which remote shards are staged")
    add_max_pixels(parser)


def command(
    parser: Callable[[str], Parser], work: str, all_ranks: bool = False
) -> Callable[[list[str], str], int]:
    """Return the `main` of a command: it parses the arguments, and only then imports torch.

    Args:
        parser: function that makes the command's parser from the name of the program.
        work: module with `run(options, world)`, or with `run(options, world, watchdog)` for a
            command that runs on all ranks.
        all_ranks: whether the command runs on all ranks.
    """

    def main(argv: list[str], prog: str) -> int:
        options = parser(prog).parse_intermixed_args(argv)

        from mae_scale.launch.logs import set_up_logging

        run = import_module(work).run
        world = World.from_environment() if all_ranks else World()
        set_up_logging(world)
        if not all_ranks:
            run(options, world)
            return 0

        from mae_scale.launch.distributed import process_group

        with process_group(world, hang_timeout=1800.0) as watchdog:
            run(options, world, watchdog)
        return 0

    return main
