"""The canvas of the page, on which a mask or a label map is painted or boxes are drawn, and the parsing of its
value."""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ldm_train.conditioning.spatial import coloured
from ldm_train.data.files import encoded_png, open_image
from ldm_train.images import to_uint8

SCRIPT = Path(__file__).with_name("sketch.js")
HELP = {
    "mask": "Paint the area to redraw. With the keyboard: arrows move, Space dabs, Enter puts the pen down and up, Ctrl Z takes back.",
    "map": "Paint labels. With the keyboard: arrows move, Space dabs, Enter puts the pen down and up, Ctrl Z takes back.",
    "boxes": "Drag a box for each object. With the keyboard: arrows move, Enter sets a corner and then the other, Delete removes the "
    "last box.",
}
CSS = """
.sketch { display: flex; flex-direction: column; gap: 8px; max-width: 480px; }
.sketch canvas { width: 100%; touch-action: none; cursor: crosshair; border: 1px solid var(--border-color-primary);
  border-radius: 4px; image-rendering: pixelated; }
.sketch canvas:focus-visible { outline: 3px solid var(--color-accent); }
.sketch .tools { display: flex; flex-wrap: wrap; gap: 12px; align-items: center; }
.sketch button, .sketch select { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 4px 10px;
  min-height: 32px; background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); }
.sketch p { font-size: var(--text-sm); color: var(--body-text-color-subdued); margin: 0; }
"""
TEMPLATE = """<div class="sketch" data-kind="KIND" data-width="WIDTH" data-height="HEIGHT">
<canvas tabindex="0" role="application" aria-label="TITLE. HELP"></canvas>
<div class="tools">TOOLS<button type="button" class="undo">Undo</button><button type="button" class="clear">Clear</button></div>
<p>HELP</p><p class="said" aria-live="polite"></p></div>"""
LABEL = '<label>Label <select aria-label="Label"></select></label>'
BRUSH = '<label>Brush <input type="range" min="1" max="MOST" value="VALUE" aria-label="Width of the brush"></label>'
ERASER = '<label><input type="checkbox"> Erase</label>'


def sketch(kind: str, title: str, size: tuple[int, int], labels: Sequence[str] = (), **options: Any) -> gr.HTML:
    """Returns a canvas of a picture's size (H, W). kind: mask, map or boxes. labels: names, for maps in the order of
    their numbers. They come from a model, so they are kept out of the markup."""
    height, width = size
    brush = BRUSH.replace("MOST", str(max(2, width // 3))).replace("VALUE", str(max(1, width // 8)))
    tools = {"mask": brush + ERASER, "map": LABEL + brush + ERASER, "boxes": LABEL}[kind]
    filled = {
        "KIND": kind,
        "WIDTH": str(width),
        "HEIGHT": str(height),
        "TITLE": title,
        "HELP": HELP[kind],
        "TOOLS": tools,
    }
    template = TEMPLATE
    for name, value in filled.items():
        template = template.replace(name, value)
    count = max(1, len(labels))
    palette = to_uint8(coloured(torch.arange(count + 1)[None, None], count + 1)[0, :, 0]).T.tolist()
    return gr.HTML(
        value="",
        html_template=template,
        css_template=CSS,
        js_on_load=SCRIPT.read_text(),
        labels=list(labels),
        colours=palette,
        **options,
    )


def with_background(picture: Image.Image) -> str:
    """Returns the value of a canvas with a picture under it on which nothing is drawn yet."""
    data = base64.b64encode(encoded_png(picture.convert("RGB"))).decode()
    return json.dumps({"background": f"data:image/png;base64,{data}", "png": "", "boxes": []})


def painted(value: Any, what: str, size: tuple[int, int]) -> bytes | None:
    """Returns what was painted on a canvas of size (H, W), as a grey PNG; None if nothing was. Raises ValueError if no
    canvas can have sent the value."""
    try:
        text = json.loads(value)["png"] if value else ""
        if not text:
            return None
        data = base64.b64decode(text.removeprefix("data:image/png;base64,"), validate=True)
        with open_image(data) as image:
            if image.size != (size[1], size[0]):
                raise ValueError(f"it has {image.size} pixels")
            return encoded_png(image.convert("RGB").getchannel("R"))
    except (TypeError, KeyError, AttributeError, binascii.Error, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the {what} is nothing that the canvas of this page has sent") from error


def canvas_value(boxes: Sequence[Any] = (), png: bytes = b"") -> str:
    """Returns the value of a canvas with these boxes [x, y, width, height, label], or this label map (a PNG) on it."""
    address = f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else ""
    return json.dumps({"background": "", "png": address, "boxes": list(boxes)})


def boxed(value: Any) -> str | None:
    """Returns the boxes that were drawn, as JSON; None if there are none. Raises ValueError if no canvas can have sent
    the value."""
    try:
        boxes = json.loads(value).get("boxes") if value else None
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError("the boxes are nothing that the canvas of this page has sent") from error
    return json.dumps(boxes) if boxes else None
