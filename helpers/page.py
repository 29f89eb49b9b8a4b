"""A notebook as one page that opens without a network: pictures inside, no scripts, formulas as they are written."""

import base64
import html
import json
import re
from pathlib import Path

from helpers.files import write_atomically

ANSI = re.compile(r"\x1b\[[0-9;]*m")
# says to the browser what is true of the page anyway: nothing is fetched and nothing runs
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
pre{overflow-x:auto;padding:.5em;background:#f6f6f6}pre.out{background:none;border-left:3px solid #ccc}
table{border-collapse:collapse;font-size:85%;display:block;overflow-x:auto}
th,td{border:1px solid #ccc;padding:.2em .6em;text-align:left}
img{max-width:100%}"""


def to_html(notebook: Path, out: Path) -> None:
    """Write the page of an executed notebook, whole or not at all. What a cell printed is text on it, never markup."""
    from pygments.formatters import HtmlFormatter

    found = json.loads(notebook.read_text(encoding="utf-8"))
    parts = [_markdown(_joined(c["source"])) if c["cell_type"] == "markdown" else _code(c) for c in found["cells"]]
    title = next((re.sub("<[^>]+>", "", m[1]) for p in parts if (m := re.search("<h1>(.*?)</h1>", p))), notebook.stem)
    head = (f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>'
            f"<style>{STYLE}\n{HtmlFormatter().get_style_defs('.highlight')}</style>")
    write_atomically(out, f"<!DOCTYPE html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n")


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _markdown(source: str) -> str:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    reader = MarkdownIt("commonmark", {"html": True}).enable("table").disable("image")  # an image would be fetched
    reader.use(dollarmath_plugin, double_inline=True, renderer=lambda text, options: html.escape(
        f"$${text}$$" if options["display_mode"] else f"${text}$"))
    return reader.render(source)


def _code(cell: dict) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    source = highlight(_joined(cell["source"]), PythonLexer(), HtmlFormatter())
    if {"setup", "hide-cell"} & set(cell["metadata"].get("tags", [])):
        source = f"<details><summary>code</summary>{source}</details>"
    return source + "".join(map(_output, cell.get("outputs", [])))


def _output(output: dict) -> str:
    if output["output_type"] == "stream":
        return _text(_joined(output["text"]))
    if output["output_type"] == "error":
        return _text("\n".join(output["traceback"]))
    data = output["data"]
    if "image/png" in data:
        png = base64.b64encode(base64.b64decode(_joined(data["image/png"]))).decode()
        return f'<p><img alt="figure" src="data:image/png;base64,{png}"></p>'
    if "text/html" in data and _is_table(table := _joined(data["text/html"])):
        return table
    return _text(_joined(data.get("text/plain", "")))


def _is_table(markup: str) -> bool:
    """Whether it is what pandas writes, which escapes what is in the cells, and nothing that would run or be fetched."""
    return set(re.findall(r"<\s*(\w+)", markup)) <= set("div style table thead tbody tr th td p".split())


def _text(text: str) -> str:
    return f'<pre class="out">{html.escape(ANSI.sub("", text))}</pre>' if text.strip() else ""
