"""One HTML page of a data set: the funnel, and rows that were kept beside rows that were rejected. Readable without a server.

It holds text that models wrote. All of it, and every name and number, passes `_text`, which leaves no markup and no quote; it stands
between tags, never within one; there is no script, and a policy in the page's head forbids any.
"""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data.rows import SourceRow
from data.text import visible

SHOWN_CHARS = 4_000
"""Longest text that is shown whole."""
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:90rem;padding:0 1rem;color:#1c2330;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}.bar{background:#3d6fb5;height:1em;min-width:1px}.lost .bar{background:#c0603a}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:2rem}article{border:1px solid #cdd4df;border-radius:6px;
margin:0 0 1rem;padding:.6rem .8rem}article.kept{border-left:5px solid #3d6fb5}article.rejected{border-left:5px solid #c0603a}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0 .6rem;font:13px/1.4 ui-monospace,monospace;max-height:22rem;overflow:auto}
.role{color:#5b6577;font-size:.8rem}.why{color:#9c4220}.about{color:#5b6577;font-size:.85rem}
@media (prefers-color-scheme:dark){body{background:#14181f;color:#dde3ec}article{border-color:#38414f}.why{color:#e59a76}}
"""
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
"""


def page(
    name: str,
    stages: Sequence[tuple[str, int]],
    reasons: Mapping[str, int],
    kept: Iterable[SourceRow],
    rejected: Iterable[Mapping[str, Any]],
) -> str:
    """The page. `stages` are counts of what came to each stage, `reasons` of what was rejected, `rejected` rows of rejected.parquet."""
    most = max([rows for _, rows in stages] + list(reasons.values()) + [1])
    funnel = "".join(_bar(stage, rows, most, "") for stage, rows in stages)
    lost = "".join(_bar(reason, rows, most, " class=lost") for reason, rows in reasons.items())
    left = "".join(_kept(row) for row in kept) or "<p>none</p>"
    right = "".join(_rejected(row) for row in rejected) or "<p>none</p>"
    return (
        f"{_HEAD}<title>{_text(name)}</title><style>{_STYLE}</style></head><body><h1>{_text(name)}</h1>"
        f"<h2>Funnel</h2><table>{funnel}</table><h2>Rejected, by reason</h2><table>{lost or '<tr><td>none</td></tr>'}</table>"
        f"<div class=side><section><h2>Kept, a sample</h2>{left}</section><section><h2>Rejected, a sample</h2>{right}</section></div>"
        "</body></html>\n"
    )


def _text(value: Any) -> str:
    """Text that can stand between tags: no markup, and nothing that a browser cannot show or reads in another direction."""
    shown = str(value)
    if len(shown) > SHOWN_CHARS:
        shown = f"{shown[:SHOWN_CHARS]} … ({len(shown) - SHOWN_CHARS:,} more characters)"
    return html.escape(visible(shown), quote=True)


def _bar(label: str, rows: int, most: int, attribute: str) -> str:
    width = 30.0 * rows / most
    return (
        f'<tr{attribute}><td>{_text(label)}</td><td class=n>{rows:,}</td><td><div class=bar style="width:{width:.2f}rem"></div></td></tr>'
    )


def _kept(row: SourceRow) -> str:
    rest = {name: value for name, value in row.values.items() if name not in ("messages", "prompt", "completion") and value is not None}
    about = " · ".join(f"{name}: {value}" for name, value in rest.items())
    return f"<article class=kept>{_turns(row.values)}<p class=about>{_text(about)}</p></article>"


def _rejected(row: Mapping[str, Any]) -> str:
    try:
        values = json.loads(row["content"])
    except ValueError:
        values = {"content": row["content"]}
    about = f"{row['file']}:{row['row']}"
    return (
        f"<article class=rejected><p class=why>{_text(row['reason'])}: {_text(row['detail'])}</p>"
        f"{_turns(values)}<p class=about>{_text(about)}</p></article>"
    )


def _turns(values: Mapping[str, Any]) -> str:
    """A row as a reader wants it: messages turn by turn, else each text column under its name."""
    turns: list[tuple[str, Any]] = []
    for name in ("messages", "prompt", "completion"):
        value = values.get(name)
        if isinstance(value, list):
            turns += [
                (message.get("role", name), message.get("content")) if isinstance(message, dict) else (name, message) for message in value
            ]
        elif value is not None:
            turns.append((name, value))
    if not turns:
        turns = list(values.items())
    return "".join(f"<div class=role>{_text(role)}</div><pre>\n{_text(content)}</pre>" for role, content in turns)
