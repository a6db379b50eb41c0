"""Write one HTML page that shows a run, or several on common axes."""

from __future__ import annotations

from pathlib import Path

from mae_scale.commands.arguments import Parser


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="HTML file to write")
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments and write the page."""
    options = parser(prog).parse_args(argv)

    from mae_scale.watching.report import write_report

    write_report(options.runs, options.out)
    print(f"wrote {options.out}")
    return 0
