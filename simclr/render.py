"""A page as blocks, and its two renderings: Markdown and one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote


class Cell(NamedTuple):
    text: str
    href: str | None = None
    emphasis: bool = False


class Heading(NamedTuple):
    level: int
    text: str


class Text(NamedTuple):
    text: str


class Notes(NamedTuple):
    lines: list[str]


class Picture(NamedTuple):
    title: str
    path: str  # relative to the page


class Table(NamedTuple):
    header: list[str]
    rows: list[list[Cell]]


Block = Heading | Text | Notes | Picture | Table

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "th,td{border:1px solid #ccc;padding:.25em .6em;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}"
    "li{color:#555}img{max-width:100%}"
)


def to_markdown(blocks: list[Block]) -> str:
    """Return the page as GitHub-flavoured Markdown; pictures are links."""
    return "\n\n".join(filter(None, map(_markdown, blocks))) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Notes(lines):
            return "\n".join(f"- {_plain(line)}" for line in lines)
        case Picture(title, path):
            return f"![{_plain(title)}]({quote(path)})"
        case Table(header, rows):
            lines = [map(_plain, header), ["---", *["---:"] * (len(header) - 1)]]
            lines += [map(_markdown_cell, row) for row in rows]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = _plain(cell.text)
    if cell.href:
        text = f"[{text}]({quote(cell.href)})"
    return f"*{text}*" if cell.emphasis and text else text


def _plain(text: str) -> str:
    """Return `text` on one line, with every character that Markdown would act upon made harmless."""
    text = re.sub(r"([\\*\[\]|])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_html(blocks: list[Block], folder: Path) -> str:
    """Return the page as one HTML file; pictures, found relative to `folder`, are inside it."""
    body = "\n".join(_html(block, folder) for block in blocks)
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Notes(lines):
            items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
            return f"<ul>{items}</ul>" if items else ""
        case Picture(title, path):
            data = base64.b64encode((folder / path).read_bytes()).decode()
            return f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></p>'
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
            body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>\n" for row in rows)
            return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _html_cell(cell: Cell) -> str:
    text = html.escape(cell.text)
    if cell.href:
        text = f'<a href="{quote(cell.href)}">{text}</a>'
    return f"<td>{f'<em>{text}</em>' if cell.emphasis and text else text}</td>"
