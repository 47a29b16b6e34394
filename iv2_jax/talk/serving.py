"""Serves the chat's page on this machine."""

from __future__ import annotations

import os
import socket
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from iv2_jax.data.decode import DecodeError
from iv2_jax.errors import ConfigError
from iv2_jax.talk.clip import VIDEOS
from iv2_jax.talk.model import AnswerOptions, TalkModel
from iv2_jax.talk.page import ChatPage
from iv2_jax.talk.quiet_gradio import gr

_MOST_EXAMPLES = 24
_CSS = """
footer {display: none !important}
#frames .thumbnail-item {aspect-ratio: 3 / 2}
"""


def serve(
    model: TalkModel,
    options: AnswerOptions,
    clips: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    wait: bool = True,
) -> tuple[gr.Blocks, str]:
    """Serves the page.

    Args:
      model: who answers.
      options: how.
      clips: clips to pick from, or folders of them.
      host: address to bind.
      port: 0 for any that is free.
      wait: until Ctrl-C, then close; False gives the page back at once.

    Returns:
      The running page, whose `close()` ends it, and its address.

    Raises:
      ConfigError: the port is taken or the address is not this machine's.
    """
    examples = example_clips(clips)
    page = ChatPage(model, options, examples).build()
    port = free_port(host, port)
    # Plain fonts of the system: the default theme's would be looked up.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    warnings.filterwarnings("ignore", module="gradio")  # it warns of its own libraries' changes
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        allowed_paths=examples,
        theme=theme,
        css=_CSS,
    )
    address = f"http://{host}:{port}"
    print(f"serving {address} (Ctrl-C ends)", file=sys.stderr, flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"note: whoever reaches {host} can use it", file=sys.stderr, flush=True)
    if wait:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("closing", file=sys.stderr)
        finally:
            page.close(verbose=False)
    return page, address


def example_clips(paths: Sequence[str]) -> list[str]:
    """Clips named, and those in folders that are named, as absolute paths.

    Raises:
      DecodeError: a path does not exist, or a folder holds no clip.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(str(f) for f in path.iterdir() if f.suffix.lower() in VIDEOS)
            if not inside:
                raise DecodeError(str(path), f"holds no video ({', '.join(VIDEOS)})")
            found += inside
        elif path.is_file():
            found.append(str(path))
        else:
            raise DecodeError(str(path), "does not exist")
    if len(found) > _MOST_EXAMPLES:
        print(f"note: the first {_MOST_EXAMPLES} of {len(found)} clips are shown", file=sys.stderr)
    return [os.path.abspath(path) for path in found[:_MOST_EXAMPLES]]


def free_port(host: str, port: int) -> int:
    """The port, checked to be free, or any that is for 0."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot serve on {host}, port {port}: {error}; try --port 0") from error
