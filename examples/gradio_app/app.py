"""Serves the page for drawing; on Hugging Face, as a Space."""

import os

from pisdm_command import let_threads_sleep


if __name__ == "__main__":
    let_threads_sleep()
    from diffusers_pisdm.app import launch  # imports torch

    launch(host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))  # a Space sets it
