"""A trained cascade on the Hub: what is uploaded, and its model card."""
