"""Pages. Markdown tables; HTML pages that are one file each and fetch nothing from the network.

    text = page.html("Title", body, style=page.part("study.css"), script=page.part("study.js"))

HTML pages have style, script and pictures inside; all share `pages/style.css`. A page's own policy
forbids every script and style but those that it was written with, and every address but its own.
"""
import base64
import hashlib
import html as entities
import io
import json
import re
from pathlib import Path

from PIL import Image

PARTS = Path(__file__).parent
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


# --------------------------------------------------------------------------------------------------
# Markdown

def escaped(text):
    """A name as Markdown shows it, on one line and in one cell of a table."""
    text = " ".join(text.split())
    for character, code in {"|": "\\|", "<": "&lt;", ">": "&gt;"}.items():
        text = text.replace(character, code)
    return text


def markdown_table(head, lines):
    """A Markdown table of texts or numbers: the first column aligned left, the others right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, rule, *lines])


# --------------------------------------------------------------------------------------------------
# HTML

def part(name):
    """The text of a file in pages/."""
    return (PARTS / name).read_text(encoding="utf-8")


def html(title, body, style="", script="", data=None):
    """A whole page.

    title: plain text. body: HTML. style, script: CSS and JavaScript of this page, after the shared
    style. data: any JSON value, which the script finds as the text of #data.
    """
    style = part("style.css") + style
    policy = ("default-src 'none'; img-src data:; connect-src 'self'; base-uri 'none'; "
              f"form-action 'none'; style-src {allowed(style)}; script-src {allowed(script)}")
    # "<" would end the element in which the data stand
    data = json.dumps(data).replace("<", "\\u003c")
    return PAGE.format(policy=policy, title=entities.escape(title), style=style, body=body,
                       data=data, script=script)


def allowed(text):
    """What a page's policy calls a script or style of just this text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def png_uri(image):
    """A uint8 image (H, W, 3) as the address of a PNG that stands in the page, without metadata."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --------------------------------------------------------------------------------------------------
# Markdown to HTML: what the pages of this project have, which is a small part of Markdown

def from_markdown(markdown, folder):
    """The HTML of a page's Markdown: a section per heading, pictures of `folder` inside.

    It knows headings, tables, pictures alone on a line, fenced code, bold and italics.
    """
    sections = [[]]
    for block in re.findall(r"^```.*?^```|^\S[^\n]*(?:\n\S[^\n]*)*", markdown, re.S | re.M):
        if block.startswith("#") and sections[-1]:
            sections.append([])
        sections[-1].append(block)
    found = []
    for blocks in sections:
        pictures = blocks[0].startswith("##") and all(b.startswith("![") for b in blocks[1:])
        kind = ' class="picture"' if pictures else ""
        body = "\n".join(block_html(block, folder) for block in blocks)
        found.append(f"<section{kind}>\n{body}\n</section>")
    return "\n".join(found)


def block_html(block, folder):
    """The HTML of one block of Markdown."""
    heading = re.fullmatch(r"(#{1,3}) (.*)", block)
    if heading:
        level = len(heading[1])
        return f"<h{level}>{inline(heading[2])}</h{level}>"
    picture = re.fullmatch(r"!\[(.*?)\]\((.*?)\)", block)
    if picture:
        content = base64.b64encode((Path(folder) / picture[2]).read_bytes()).decode()
        return (f'<button class="figure"><img alt="{inline(picture[1])}" '
                f'src="data:image/png;base64,{content}"></button>')
    if block.startswith("```"):
        code = block.split("\n", 1)[1].removesuffix("```")
        return f"<pre>{entities.escape(code)}</pre>"
    if block.startswith("|"):
        return table_html(block.splitlines())
    return f"<p>{inline(block)}</p>"


def table_html(lines):
    """The HTML of a Markdown table: the first cell of each line is its heading."""
    head, _, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    titles = "".join(f'<th scope="col">{inline(cell)}</th>' for cell in head)
    body = ""
    for name, *cells in rows:
        body += f'<tr><th scope="row">{inline(name)}</th>'
        body += "".join(f"<td>{inline(cell)}</td>" for cell in cells) + "</tr>\n"
    return (f'<div class="table"><table>\n<thead><tr>{titles}</tr></thead>\n'
            f"<tbody>\n{body}</tbody>\n</table></div>")


def inline(text):
    """The HTML of a line of Markdown; names in it have been through `escaped`."""
    text = entities.escape(entities.unescape(text.strip().replace("\\|", "|")))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\*(.+?)\*", r"<i>\1</i>", text)
