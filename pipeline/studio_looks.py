"""Appearance of the studio: images as HTML, the style sheet, and a canvas for painting a mask.

Images are part of the page (data URIs at their own size, enlarged by the browser): no file is written or served, and an
image saved from the page has exactly the pixels of the model.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from torch import Tensor

from data.images.views import pixels_to_picture
from pipeline.studio_actions import Shown

LARGEST_PIXELATED = 128
"""Images up to this side are enlarged without smoothing; larger ones are smoothed."""

STYLE = """
.gradio-container { max-width: 1160px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.6rem; font-weight: 600; margin: .3rem 0 .1rem; overflow-wrap: anywhere; }
#head p, .hint, .foot, .reach { font-size: .92rem; line-height: 1.5; margin: 0; color: var(--body-text-color);
  opacity: .75; }
.foot { overflow-wrap: anywhere; border-top: 1px solid var(--border-color-primary); padding-top: .8rem; }
.reach { font-variant-numeric: tabular-nums; }
button[role=tab][aria-selected=true] { color: var(--body-text-color) !important; font-weight: 600; }
.beside { align-self: flex-end; white-space: nowrap; font-weight: 500 !important; }
#reach { margin: -.4rem 0 -.7rem; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(var(--columns), 1fr); }
.pictures figure { margin: 0; }
.pictures a { display: block; }
.pictures img { display: block; width: 100%; height: auto; border-radius: 4px; }
.pictures img.pixelated { image-rendering: pixelated; }
.pictures figcaption { color: var(--body-text-color); opacity: .75; font-size: .84rem; line-height: 1.3;
  padding-top: .35rem; font-variant-numeric: tabular-nums; }
.empty { display: grid; place-items: center; min-height: 20rem; border: 1px dashed var(--border-color-primary);
  border-radius: 8px; padding: 1rem; text-align: center; color: var(--body-text-color); }
.empty span { opacity: .75; }
.painter canvas { width: 100%; max-width: 320px; aspect-ratio: 1; border-radius: 4px; cursor: crosshair;
  touch-action: none; display: block; }
.painter p { font-size: .88rem; line-height: 1.4; margin: .4rem 0 0; color: var(--body-text-color); opacity: .75; }
.painter button { font-size: .88rem; text-decoration: underline; background: none; border: 0; padding: .2rem 0;
  color: inherit; cursor: pointer; }
@media (max-width: 640px) { .pictures { grid-template-columns: repeat(min(var(--columns), 2), 1fr); } }
"""

PAINTER = """
<div class="painter"><canvas width="640" height="640" aria-label="paint what is to change"></canvas>
<p>${hint}
<button type="button">Clear the painting</button></p></div>
"""

# props: hint (one line), picture (data URI of the image to paint on), cells (per side),
# value (the mask: cells x cells characters 0 or 1)
PAINTER_SCRIPT = """
const canvas = element.querySelector("canvas"), context = canvas.getContext("2d"), image = new Image();
let open = [], paint = null;
function show() {
  const cells = props.cells, side = canvas.width / cells;
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!props.picture) return;
  context.imageSmoothingEnabled = image.width > 128;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  for (let at = 0; at < open.length; at++) {
    const x = (at % cells) * side, y = Math.floor(at / cells) * side;
    if (open[at]) { context.fillStyle = "rgba(224, 64, 48, .55)"; context.fillRect(x, y, side, side); }
    context.strokeStyle = "rgba(128, 128, 128, .35)"; context.strokeRect(x, y, side, side);
  }
}
function tell() { props.value = open.includes(true) ? open.map(Number).join("") : ""; }
function clear() { open = Array(props.cells * props.cells).fill(false); show(); }
function load() { clear(); if (props.picture) image.src = props.picture; }
function touch(event) {
  const box = canvas.getBoundingClientRect(), cells = props.cells;
  const x = Math.floor((event.clientX - box.left) / box.width * cells);
  const y = Math.floor((event.clientY - box.top) / box.height * cells);
  if (x < 0 || y < 0 || x >= cells || y >= cells || !props.picture) return;
  if (paint === null) paint = !open[y * cells + x];
  open[y * cells + x] = paint;
  show();
}
image.onload = show;
canvas.onpointerdown = event => { canvas.setPointerCapture(event.pointerId); paint = null; touch(event); };
canvas.onpointermove = event => { if (event.buttons) touch(event); };
canvas.onpointerup = tell;
element.querySelector("button").onclick = () => { clear(); tell(); };
watch("picture", load);
load();
"""


def data_uri(pixels: Tensor) -> str:
    """PNG of an image uint8 [C, h, w] as a data URI."""
    buffer = io.BytesIO()
    pixels_to_picture(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def pictures(shown: Sequence[Shown]) -> str:
    """HTML of images side by side, displayed at the same size; a click saves an image."""
    parts = []
    for pixels, caption, name in shown:
        uri = data_uri(pixels)
        look = ' class="pixelated"' if pixels.shape[-1] <= LARGEST_PIXELATED else ""
        parts.append(
            f'<figure><a href="{uri}" download="{escape(name)}.png" title="save">'
            f'<img{look} src="{uri}" alt="{escape(caption)}"></a><figcaption>{escape(caption)}</figcaption></figure>'
        )
    columns = {1: 2, 2: 2, 3: 3, 5: 3, 6: 3, 9: 3}.get(len(shown), 4)
    return f'<div class="pictures" style="--columns: {columns}">{"".join(parts)}</div>'


def empty(text: str) -> str:
    """HTML of a placeholder for images."""
    return f'<div class="empty"><span>{escape(text)}</span></div>'


def line(text: str, style: str = "hint") -> str:
    """HTML of a line of text."""
    return f'<p class="{style}">{escape(text)}</p>'
