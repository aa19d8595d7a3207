"""Turn the report into one HTML file without scripts, whose figures are inside the file."""

import base64
from collections.abc import Mapping

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .75rem; break-after: avoid }
h1 { margin-top: 0 }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .25rem }
p, ul, ol { max-width: 46rem }
img { display: block; max-width: 100%; height: auto; break-inside: avoid }
.table { overflow-x: auto; margin: 1rem 0 }  /* on a phone; a wider page shows tables whole */
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top;
  overflow-wrap: anywhere }
th { border-bottom: 2px solid #666; overflow-wrap: normal }  /* whole words */
tr { break-inside: avoid }
@media print {
  @page { size: A4 landscape; margin: 12mm }
  body { max-width: none; padding: 0; font-size: 10pt }
  .table { overflow: visible }
  table { font-size: 7pt }
  th, td { padding: .2rem .4rem }
}
""".strip()

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
{body}</body>
</html>
"""


def page(title: str, markdown: str, figures: Mapping[str, bytes]) -> str:
    """Return the Markdown as a page.

    Args:
        title: of the page; plain words.
        figures: SVG by the file name that the Markdown gives an image. An image that is not among
            them becomes its description, because users can put image links into names.
    """
    # Names come from outside. Since HTML is off, a name such as "<script>" is shown as text.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    # A table in a box of its own can be scrolled; otherwise a wide one would widen the whole page.
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", _table_close)

    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                _embed(child, figures)

    body = parser.renderer.render(tokens, parser.options, {})
    return PAGE.format(title=title, style=STYLE, body=body)


def _embed(image, figures):
    svg = figures.get(str(image.attrs["src"]))
    if svg is None:
        # An image's token holds its description, which is now rendered and escaped as text.
        image.type, image.tag = "text", ""
    else:
        image.attrs["src"] = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _table_open(renderer, tokens, index, options, env):
    return '<div class="table">\n' + renderer.renderToken(tokens, index, options, env)


def _table_close(renderer, tokens, index, options, env):
    return renderer.renderToken(tokens, index, options, env) + "</div>\n"
