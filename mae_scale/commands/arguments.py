"""The parser of the commands that have no config."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from mae_scale.config.sizes import ImageSize, plain_size
from mae_scale.errors import UserError, did_you_mean

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

IMG_SIZE = (
    "side of the images in pixels, or height and width such as 224x448; default: that of the "
    "weights"
)


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
