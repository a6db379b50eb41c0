"""Names of local and remote files: telling them apart, joining, showing and opening them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from mae_scale.errors import UserError

# Schemes that webdataset opens.
SCHEMES = ("https", "http", "s3", "gs", "hf", "pipe", "sftp", "ftps", "scp", "ais", "htgs")


def is_remote(spec: str) -> bool:
    """Return whether a name is a URL or a ``pipe:`` command, and not a path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", spec) is not None and not spec.startswith("file:")


def scheme_of(spec: str) -> str:
    """Return the part of a URL or command before the colon; empty for a path."""
    return spec.partition(":")[0].lower() if is_remote(spec) else ""


def join(root: str, name: str) -> str:
    """Return the path or URL of a file of the set; absolute names and URLs stay as they are.

    In ``pipe:`` commands and URLs, ``{}`` stands for the file name:
    ``pipe:aws s3 cp s3://bucket/train/{} -``.
    """
    if is_remote(name) or Path(name).is_absolute():
        return name
    if "{}" in root:
        return root.replace("{}", name)
    return f"{root.rstrip('/')}/{name}"


def address_of(url: str) -> str:
    """Return the address of a tar as it is typed, with ``{}`` for the tar's name, see `shown`."""
    folder, slash, _ = shown(url).rpartition("/")
    return f"{folder}{slash}{{}}"


def has_secrets(spec: str) -> bool:
    """Return whether a name may hold a secret, as commands and URLs with password or query may."""
    if scheme_of(spec) == "pipe":
        return True
    return is_remote(spec) and re.search(r"^[^/]*//[^/]*@|[?#]", spec) is not None


def shown(spec: str) -> str:
    """Return a name as messages and manifests may show it, without secrets and control characters.

    A command is reduced to its program and the name of the tar; a URL loses its password and all
    that follows the path.
    """
    if scheme_of(spec) == "pipe":
        words = [word for word in spec[len("pipe:") :].split() if "=" not in word]
        tars = re.findall(r"[\w.-]+\.tar\b", spec)
        spec = " ".join(["pipe:" + (words[0] if words else ""), "…", *tars[-1:]])
    elif is_remote(spec):
        spec = re.sub(r"^([^/]*//)[^/]*@", r"\1", re.split(r"[?#]", spec, maxsplit=1)[0])
    return printable(spec)


def printable(text: str) -> str:
    """Escape the characters of an untrusted text that act on a terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def open_remote(url: str) -> Any:
    """Open a URL through webdataset's opener, as a process that writes to a pipe.

    ``https:`` goes through curl, ``s3:`` through the AWS command line, ``pipe:`` is any command.

    Raises:
        UserError: the scheme is unknown.
        OSError: the program cannot be started.
    """
    from webdataset import gopen

    if scheme_of(url) not in SCHEMES:
        raise UserError(
            f"{shown(url)} begins with an unknown scheme; known: {':, '.join(SCHEMES)}:"
        )
    url = scheme_of(url) + url[len(scheme_of(url)) :]  # S3: is s3:
    return gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3:") else url, "rb")
