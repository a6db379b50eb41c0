"""Print a script with which a shell completes commands, options, recipes and values.

In bash: source <(mae-scale completion bash), or that line in ~/.bashrc. In zsh: the same with zsh
in ~/.zshrc, or write the script into a file named _mae-scale in a folder of fpath.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from mae_scale.commands import COMMANDS
from mae_scale.commands.arguments import Parser
from mae_scale.config.keys import Key, alternatives, config_keys
from mae_scale.config.parsing import recipe_names
from mae_scale.errors import UserError
from mae_scale.tasks.task import TASKS

SHELLS = ("bash", "zsh")
# shtab's script for zsh takes itself for an autoloaded function where a shell reads it by `source`.
# This end asks for the name under which fpath would have it, and starts completion where the user's
# own files have not.
_SHTABS_END = "\nif [[ $zsh_eval_context[-1] == eval ]]"
_ZSH_END = """
if [[ $funcstack[1] == _mae-scale ]]; then
  _shtab_mae_scale "$@"
else
  (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
  compdef _shtab_mae_scale mae-scale
fi"""


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments and print the script."""
    options = parser(prog).parse_args(argv)
    print(script(options.shell))
    return 0


def script(shell: str) -> str:
    """Compose the script.

    Args:
        shell: "bash" or "zsh".

    Raises:
        UserError: shtab, which composes it, is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs shtab: pip install shtab") from None
    text = shtab.complete(everything(), shell)
    return text if shell == "bash" else text.partition(_SHTABS_END)[0] + _ZSH_END


def everything() -> argparse.ArgumentParser:
    """Make one parser of all commands, for completion only."""
    from importlib import import_module

    whole = argparse.ArgumentParser(prog="mae-scale")
    commands = whole.add_subparsers()
    for name, task in TASKS.items():
        added = commands.add_parser(name, help=task.about)
        recipes = [recipe for recipe in recipe_names() if recipe.startswith(name)]
        _add(added, "--config", choices=recipes + [r for r in recipe_names() if r not in recipes])
        for name_of_key, key in config_keys(task.config).items():
            places = name_of_key in _PATHS
            _add(added, f"--{name_of_key}", choices=_choices(key), places=places)
    for name, about in COMMANDS.items():
        own = import_module(f"mae_scale.commands.{name}").parser(f"mae-scale {name}")
        added = commands.add_parser(name, help=about, parents=[own], conflict_handler="resolve")
        for action in added._actions:
            if (action.choices is None and not action.option_strings) or _is_path(action):
                _complete_files(action)
    return whole


# Config keys whose values are completed as paths.
_PATHS = ("run_dir", "weights", "deepspeed", "data.train", "data.val", "data.cache_dir")


def _add(
    parser: argparse.ArgumentParser, option: str, *, choices: Any, places: bool = False
) -> None:
    action = parser.add_argument(option, choices=choices or None)
    if places:
        _complete_files(action)


def _complete_files(action: Any) -> None:
    import shtab

    action.complete = shtab.FILE


def _is_path(action: Any) -> bool:
    return getattr(action.type, "__name__", "") == "Path"


def _choices(key: Key) -> list[str]:
    """List the words that a config key takes; empty if its type names no words."""
    kinds = alternatives(key.type)
    if bool in kinds:
        return ["true", "false"]
    return [str(word) for each in kinds if get_origin(each) is Literal for word in get_args(each)]
