"""What all pages share: in what two results differ; tables; Markdown as one file of HTML."""
import base64
import html
import io
import re
from pathlib import Path

import markdown
from PIL import Image

import disk
from loop import RESUMABLE
from runtime import UserError

# Settings that say where files are, or move none of the numbers that are compared; seeds
FREE = {"seed", "ckpt", "samples", "out", "command", "config", "per_class", "floor"}
FILES = {"init_from", "extra"}          # of each seed its own: they differ where one has none
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ max-width: 76rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
p:not(:has(img)) {{ max-width: 48rem; }}
img {{ max-width: 100%; }}
table, pre {{ display: block; overflow-x: auto; border-collapse: collapse; }}
th, td {{ padding: 0.3rem 0.7rem; border: 1px solid #d5d7db; white-space: nowrap; }}
</style>
{body}
"""


def named(text, flag):
    """(name, files) of a flag's value "NAME=FILES". Raises UserError."""
    name, _, files = text.rpartition("=")
    name = " ".join(name.split())
    if not name or not files:
        raise UserError(f"{flag} {text}: give NAME=FILE")
    return name, files


def differences(a, b):
    """{setting: (its value in a, in b)}: in what two experiments differ, but for seeds and paths.

    a, b: "settings" of results or of samples. Those of training, "config" in them, count where
    both have them.
    """
    trained = [{key: value for key, value in s.get("config", {}).items() if key not in RESUMABLE}
               for s in (a, b)]
    found = {}
    for x, y in [trained, (a, b)] if all(trained) else [(a, b)]:
        for key in {**x, **y}:
            pair = x.get(key), y.get(key)
            same = pair[0] == pair[1] or key in FILES and None not in pair
            if not (same or key in FREE or key.endswith("sha256")):
                found[key] = pair
    return found


def in_words(found):
    """What differences found as text: "guidance 0.0 / 1.5, step 500 / 1000"."""
    return ", ".join(f"{key} {a} / {b}" for key, (a, b) in found.items())


def escaped(text):
    """A name as Markdown shows it, on one line and in one cell of a table."""
    text = " ".join(text.split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def markdown_table(head, lines):
    """A Markdown table of texts or numbers: the first column aligned left, the others right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, rule, *lines])


def write(path, text):
    """Write a page of Markdown to `path`, and the same as HTML beside it."""
    path = Path(path)

    def inside(match):
        content = base64.b64encode((path.parent / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    body = re.sub(r'src="([^":]+\.png)"', inside, body)
    title = html.escape(text.splitlines()[0].lstrip("# "))
    disk.write_text(path, text)
    disk.write_text(path.with_suffix(".html"), PAGE.format(title=title, body=body))


def png_uri(image):
    """A uint8 image (H, W, 3) as the address of a PNG that stands in the page, without metadata."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
