"""Publishes a trained cascade on the Hub, with its model card."""
