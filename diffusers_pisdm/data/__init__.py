"""From image folders, data sets and latents to batches of training rows."""
