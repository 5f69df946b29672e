"""Starting a page with the looks that all pages of this package share."""

from typing import Any

import gradio as gr

from .looks.theme import looks
from .subject.lanes import LANES, MOST_WAITING


def launch(blocks: gr.Blocks, **options: Any) -> Any:
    """Start a page, as `gr.Blocks.launch` does, with its looks.

    Args:
        blocks (`gr.Blocks`): For example from [`build_demo`].
        options: Of `launch`: `server_port`, `share`, `mcp_server`, ...
    """
    # A visitor who waits for a language model holds a thread: see `subject/lanes.py`.
    threads = len(LANES) * (MOST_WAITING + 1) + 40
    queue = blocks.queue(max_size=100)
    return queue.launch(**{"footer_links": ["api", "settings"], "max_threads": threads, **looks(), **options})
