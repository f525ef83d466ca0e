"""The HTML of a report. Plotly and its figures are in it, compressed; nothing is loaded."""

import base64
import gzip
import json
from collections.abc import Iterable
from html import escape
from typing import Any

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'">
<title>%s</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 0 12px;
  color: #222; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
h3 { font-size: 1em; margin: 1.2em 0 0.3em; }
.scrolls { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #eee;
  vertical-align: top; }
td:nth-child(1) { font-weight: 600; } td.protocol { min-width: 16em; }
pre { overflow-x: auto; font-size: 12px; background: #f6f6f6; padding: 8px; }
.plots, .cameras, .maps { display: grid; gap: 10px; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%%), 1fr)); }
.cameras { grid-template-columns: repeat(auto-fill, minmax(min(170px, 45%%), 1fr)); }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(150px, 45%%), 1fr)); }
.plots > div { min-width: 0; } .plot { height: 300px; } .plot.tall { height: min(75vh, 560px); }
figure { margin: 0; min-width: 0; } figure img { width: 100%%; display: block; }
.maps img { image-rendering: pixelated; background: #000; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
.note { background: #fff6d6; padding: 6px 10px; } summary { cursor: pointer; }
</style>
</head>
<body>
"""

_SCRIPT = """<script>
(async () => {
  const unpack = async (id) => {
    const packed = atob(document.getElementById(id).textContent);
    const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const script = document.createElement("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);
  const figures = JSON.parse(await unpack("figures"));
  for (const place of document.querySelectorAll(".plot")) {
    const { data, layout } = figures[place.dataset.figure];
    await Plotly.newPlot(place, data, layout, { responsive: true, displayModeBar: false });
  }
})();
</script>
"""


class Page:
    """HTML that grows from top to bottom; text given to it is escaped."""

    def __init__(self, title: str):
        self.parts = [_HEAD % escape(title), f"<h1>{escape(title)}</h1>"]
        self.figures: list[Any] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self.parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str, note: bool = False) -> None:
        """A paragraph; a ``note`` is set off."""
        self.parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def pre(self, texts: Iterable[str], summary: str) -> None:
        """Texts as they are, folded away."""
        body = "".join(f"<pre>{escape(text)}</pre>" for text in texts)
        self.parts.append(f"<details><summary>{escape(summary)}</summary>{body}</details>")

    def table(self, lines: list[list[str]]) -> None:
        """Lines of cells, the first the heading; wide ones scroll."""
        heading, *rows = lines
        html = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
        html = f"<tr>{html}</tr>"
        for row in rows:
            cells = (
                f"<td{' class=protocol' if name == 'protocol' else ''}>{escape(cell)}</td>"
                for name, cell in zip(heading, row, strict=True)
            )
            html += f"<tr>{''.join(cells)}</tr>"
        self.parts.append(f"<div class=scrolls><table>{html}</table></div>")

    def images(self, kind: str, uris: dict[str, str]) -> None:
        """Pictures by caption, side by side; ``kind`` is ``cameras`` or ``maps``."""
        html = "".join(
            f'<figure><img src="{uri}" alt="{escape(name)}"><figcaption>{escape(name)}'
            "</figcaption></figure>"
            for name, uri in uris.items()
        )
        self.parts.append(f"<div class={kind}>{html}</div>")

    def plots(self, figures: dict[str, Any], tall: bool = False) -> None:
        """Plotly's figures by title, side by side."""
        html = ""
        for title, figure in figures.items():
            look = "plot tall" if tall else "plot"
            place = f'<div class="{look}" data-figure="{len(self.figures)}"></div>'
            html += f"<div><h3>{escape(title)}</h3>{place}</div>"
            self.figures.append(json.loads(figure.to_json()))
        self.parts.append(html if tall else f"<div class=plots>{html}</div>")

    def html(self) -> str:
        """The whole file."""
        from plotly.offline import get_plotlyjs

        packed = {"plotly": get_plotlyjs(), "figures": json.dumps(self.figures)}
        for name, text in packed.items():
            data = base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
            self.parts.append(f'<script type="text/plain" id="{name}">{data}</script>\n')
        return "".join([*self.parts, _SCRIPT, "</body>\n</html>\n"])
