"""Serves the page for drawing; on Hugging Face, as a Space."""

import os

from diffusers_pisdm.app import launch


if __name__ == "__main__":
    launch(host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))  # a Space sets it
