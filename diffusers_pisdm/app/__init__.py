"""A page to draw on in the browser: `launch()` serves it, here or as a Hugging Face Space."""

from .page import build_app, launch


__all__ = ["build_app", "launch"]
