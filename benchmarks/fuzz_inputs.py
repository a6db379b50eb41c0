"""Strategies of hypothesis that spoil files: bytes, JSON documents, tars."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# Values that a program does not expect where it wrote another value.
STRANGE = [
    None, True, -5, 0, 7, 1e30, 1e308, -1e308, float("nan"), float("inf"), 10**30, 2**63, -(2**31),
    "", "x" * 5000, "a\nb", "\x1b[2J\x07", "<script>alert(1)</script>", '"><img src=x>', "../x",
    "/etc/passwd", "pipe:touch X", "a\0b", "\ud800", "٣", "1e999", [], {}, [[]], [None], {"a": 1},
    {"": {}}, [1, 2], [1e308, -1e308],
]  # fmt: skip


def plain() -> st.SearchStrategy[Any]:
    """Make a strategy of values as JSON has them."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )


def _places(document: Any) -> list[tuple[Any, Any]]:
    """List each container in a document with each of its keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        value = waiting.pop()
        keys = value.keys() if isinstance(value, dict) else range(len(value))
        for key in list(keys):
            found.append((value, key))
            if isinstance(value[key], (dict, list)):
                waiting.append(value[key])
    return found


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Make a document in which a few values are changed, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        if not places:
            return document
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        what = draw(st.sampled_from(["strange", "strange", "plain", "gone", "near", "more"]))
        value = holder[key]
        if what == "gone":
            del holder[key]
        elif what == "near" and type(value) in (int, float):
            holder[key] = value + draw(st.sampled_from([-1, 1, 0.5, 512, -512, 1e9]))
        elif what == "more" and isinstance(holder, list):
            holder.append(copy.deepcopy(value))
        elif what == "more":
            holder[draw(st.text(max_size=8))] = draw(plain())
        else:
            other = draw(st.sampled_from(STRANGE) if what == "strange" else plain())
            holder[key] = copy.deepcopy(other)  # the next change may be inside of it
    return document


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Make bytes of which a few are changed, removed or doubled."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        # The headers, in which formats differ most, are at the beginning.
        at = at % 64 if draw(st.booleans()) else at
        size = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 512]))
        what = draw(st.sampled_from(["flip", "cut", "set", "insert", "remove", "repeat"]))
        if what == "flip" and data:
            data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at:]
        elif what == "set":
            fill = draw(st.sampled_from([0, 255, 127, 128, ord("9")]))
            data[at : at + size] = bytes([fill]) * len(data[at : at + size])
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif what == "remove":
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
    return bytes(data)


def dumped(value: Any) -> bytes:
    """Encode a value as JSON, also where JSON has no such value."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def json_files(document: Any) -> st.SearchStrategy[bytes]:
    """Make a strategy of files that resemble this JSON document."""
    deep = b"[" * 100_000, b'{"a":' * 100_000, b"[" * 5000 + b"]" * 5000
    return st.one_of(
        changed(document).map(dumped),
        changed(document).map(dumped),
        spoilt(dumped(document)),
        plain().map(dumped),
        st.just(dumped(document)),
        st.sampled_from([*deep, b"", b"\xff", b"1" * 10_000, b"\xef\xbb\xbf{}"]),
    )


def json_lines(rows: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Make a strategy of files that resemble these rows, with a JSON object a line."""
    whole = b"".join(dumped(row) + b"\n" for row in rows)
    mixed = st.lists(
        st.sampled_from(rows).flatmap(changed).map(dumped) | st.sampled_from(rows).map(dumped),
        max_size=12,
    ).map(lambda lines: b"\n".join(lines) + b"\n")
    huge = st.just(b'{"step": 1, "x": "' + b"y" * (1 << 21) + b'"}\n' + whole)
    return st.one_of(mixed, mixed, mixed, spoilt(whole), st.binary(max_size=200), huge)


def yaml_files(text: bytes, document: Any) -> st.SearchStrategy[bytes]:
    """Make a strategy of files that resemble this YAML."""
    laughs = b"a0: &a0 {x: 1}\n" + b"".join(
        b"a%d: &a%d {x: *a%d, y: *a%d}\n" % (i, i, i - 1, i - 1) for i in range(1, 40)
    )
    tricks = [
        laughs, b"a: &a {b: *a}\n", b"a: &a [*a]\n", b"!!python/object/apply:os.system [touch X]\n",
        b"run_dir: !!python/object/new:os.system [x]\n", b"a: 2001-99-99\n", b"? [a]\n: b\n",
        b"a: " + b"9" * 5000 + b"\n", b"{" * 2000, b"- " * 2000, b"a: !!binary x\n", b"a: 1:1:1\n",
        b"<<: 3\n", b"<<: *x\n", b"%YAML 9.9\n---\na\n", b"1: 2\n", b"model: {1: 2}\n",
        b"model: 3\n", b"train: []\n", b"data: null\n", b"~: {}\n", b"", b"---\n---\n", b"\0",
    ]  # fmt: skip
    return st.one_of(
        changed(document).map(dumped),  # YAML holds JSON
        changed(document).map(dumped),
        spoilt(text),
        st.just(text),
        st.sampled_from(tricks),
        st.sampled_from(tricks).map(lambda trick: text + trick),
    )


NAMES = ["a.jpg", "a.cls", "a.json", "a.seg.png", "b.jpg", "a.1.jpg", "./a.png", "d/a.jpg", ".jpg"]

PAX = st.dictionaries(
    st.sampled_from(
        ["path", "size", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major",
         "GNU.sparse.realsize", "mtime"]
    ),
    st.sampled_from(["1", "-1", "9" * 30, "x", "0,5,9", "1e9"]) | st.text(max_size=9),
    max_size=3,
)  # fmt: skip


@st.composite
def tars(draw: st.DrawFn, image: bytes) -> bytes:
    """Make a tar of samples, of any form, maybe with a strange header or with damaged bytes."""
    labels = [
        b"3", b"-1", b"x" * 300, b"", b"\xff", b"1e30", b'{"label": 3}', b'{"label": {}}',
              b"[" * 5000, b'{"cls": 1e400, "label": "\\u001b"}', b"999999999999", b"nan",
    ]  # fmt: skip
    stream = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for _ in range(draw(st.integers(0, 4))):
            name = draw(st.sampled_from(NAMES) | st.text(min_size=1, max_size=90))
            content = draw(st.sampled_from([image, b"", *labels]) | st.binary(max_size=40))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if draw(st.integers(0, 4)) == 0:
                member.type = draw(
                    st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"6", b"S", b"z"])
                )
                member.linkname = draw(st.sampled_from(["a.jpg", "/etc/passwd", "../x", ""]))
                member.size = len(content) if member.isreg() else 0
            if form == tarfile.PAX_FORMAT and draw(st.booleans()):
                member.pax_headers = draw(PAX)
            try:
                tar.addfile(member, io.BytesIO(content))
            except (ValueError, UnicodeError):  # tarfile itself does not write such a name
                continue
    data = stream.getvalue()
    what = draw(st.sampled_from(["whole", "header", "spoilt", "cut"]))
    if what == "spoilt":
        return draw(spoilt(data))
    if what == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if what == "header" and len(data) >= 512:
        return draw(strange_header(data))
    return data


@st.composite
def strange_header(draw: st.DrawFn, data: bytes) -> bytes:
    """Make a tar with a changed header whose checksum is right."""
    tar = bytearray(data)
    at = 512 * draw(st.integers(0, len(tar) // 512 - 1))
    field, size = draw(
        st.sampled_from([(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (345, 155)])
    )
    value = draw(
        st.sampled_from([b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"-0000000001\0",
                         b"L", b"K", b"x", b"g", b"S", b"X", b"00000000000\0", b"\0" * 12])
        | st.binary(min_size=1, max_size=size)
    )  # fmt: skip
    tar[at + field : at + field + min(size, len(value))] = value[:size]
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return bytes(tar)


def in_file(name: str) -> Callable[[bytes], dict[str, bytes]]:
    """Give a function that makes a folder with only this file, from its content."""
    return lambda content: {name: content}
