"""`matryoshka-sae space`: the page, on this machine."""

import argparse
import importlib.util
import sys
import threading

from ..common.data_source import EMBEDDED


def main(arguments: list[str] | None = None) -> int:
    """Start the page from command-line arguments and serve until it is stopped; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    if parsed.mcp and importlib.util.find_spec("mcp") is None:
        sys.stderr.write('error: --mcp needs a package: pip install "gradio[mcp]"\n')
        return 2
    try:
        from .launching import launch
        from .page import WARMING, build_demo
    except ImportError as error:
        sys.stderr.write(f'error: {error}. The page needs Gradio: pip install "hf_matryoshka_sae[space]"\n')
        return 2
    from transformers.utils import logging

    from .limits import UNREACHABLE, forget_own_token
    from .subject.library import Library

    logging.disable_progress_bar()
    try:
        public = parsed.share or parsed.host not in ("127.0.0.1", "localhost", "::1")
        if public:
            forget_own_token()
        library = Library(
            parsed.dataset,
            parsed.tokens,
            parsed.context_length,
            parsed.model,
            revision=parsed.revision,
            public=public,
            shown=[parsed.source],
            most_gigabytes=parsed.most_gigabytes,
        )
        if (parsed.source, parsed.model, parsed.dataset) != (EMBEDDED, None, None):
            library.open(parsed.source)  # what is not there is said now, not on the page
        page = build_demo(library, parsed.source, warm=True)
        launch(
            page,
            server_name=parsed.host,
            server_port=parsed.port,
            share=parsed.share,
            mcp_server=parsed.mcp,
            inbrowser=parsed.open,
        )
    except (ValueError, OverflowError, *UNREACHABLE) as error:
        sys.stderr.write(f"error: {error}\n")
        for thread in threading.enumerate():
            if thread.name == WARMING:
                thread.join()  # torch aborts a process that ends while a thread of it computes
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae space",
        description="Start a page on which dictionaries are pruned and their features looked at.",
    )
    parser.add_argument(
        "source",
        metavar="REPO_OR_DIR",
        nargs="?",
        default=EMBEDDED,
        help="what is open at first: Hub id, folder of an SAE or of several, or 'embedded' (default)",
    )
    parser.add_argument("--model", help="language model of all SAEs (default: what each names)")
    parser.add_argument("--dataset", metavar="PATH", help="text to measure on: file, folder or Hub id")
    parser.add_argument("--tokens", type=int, default=10_000, help="of it, to measure on (default: %(default)s)")
    parser.add_argument("--context_length", type=int, default=128, help="in tokens (default: %(default)s)")
    parser.add_argument("--revision", help="of repositories on the Hub: branch, tag or commit")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s). On any other, as with --share, strangers may come: the "
        "page then opens no other folder, and neither reads nor pushes with this machine's token",
    )
    parser.add_argument(
        "--most_gigabytes",
        type=float,
        metavar="GB",
        help="of files that an SAE on the Hub may have, and its language model (default: 4 where strangers may come)",
    )
    parser.add_argument("--port", type=int, help="to listen on (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="make a public link that lasts a week; see --host")
    parser.add_argument("--mcp", action="store_true", help='serve the API to language models too ("gradio[mcp]")')
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    return parser
