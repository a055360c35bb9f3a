"""studio: a local web page to sample, upsample and edit images with a finished run."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from importlib.util import find_spec

from PIL import Image

from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.models import load_models
from pipeline.own_keys import StudioRequest
from pipeline.studio_actions import MAX_PIXELS, Studio
from pipeline.studio_looks import STYLE
from pipeline.studio_page import build_page

MAX_FILE_SIZE = "10mb"
MAX_WAITING = 32
"""Maximum number of queued requests; further ones are rejected."""
MAX_SESSIONS = 100
"""Maximum number of pages whose last samples are kept."""


def run_studio(config: Config, request: StudioRequest) -> None:
    """Serve the page until interrupted. Raises RunError without gradio or without a free port."""
    if find_spec("gradio") is None:
        raise RunError("the studio needs gradio: run `make studio`, or `pip install 'octaves[studio]'`")
    if not 0 <= request.port < 2**16:
        raise RunError(f"port={request.port}; allowed: 1 to 65535, or 0 for the first free one from 7860")
    studio = Studio(config, load_models(config))
    # exit normally on SIGTERM, so that uploads are removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="octaves-studio-") as uploads:
        # gradio reads these when it is imported
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = uploads
        # an upper limit for every decoder: Pillow rejects images with more than twice this number of pixels
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        _serve(studio, request)


def _serve(studio: Studio, request: StudioRequest) -> None:
    import gradio as gr

    page = build_page(studio).queue(max_size=MAX_WAITING)
    fonts = ["system-ui", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="slate", neutral_hue="stone", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = page.launch(
            server_name=request.host,
            server_port=request.port or None,
            share=False,
            quiet=True,
            show_error=False,
            max_file_size=MAX_FILE_SIZE,
            allowed_paths=[],
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            state_session_capacity=MAX_SESSIONS,
            prevent_thread_lock=True,
            theme=theme,
            css=STYLE,
        )
    except OSError as error:
        raise RunError(f"host={request.host} port={request.port}: {error}; choose another port") from error
    print(f"octaves studio: {address}  (ctrl-c ends it)", flush=True)
    page.block_thread()
