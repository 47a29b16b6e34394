"""Gradio with everything off that would speak to the outside; `gr` is the library.

Raises:
  ConfigError: (on import) Gradio is not installed.
"""

from __future__ import annotations

import os

from iv2_jax.errors import ConfigError

# Read by the libraries when they are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
try:
    import gradio as gr
except ImportError as error:
    raise ConfigError(f"the page needs Gradio ({error}): pip install 'iv2_jax[chat]'") from error

__all__ = ["gr"]
