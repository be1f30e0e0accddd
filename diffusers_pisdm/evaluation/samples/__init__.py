"""Sample sets: reproducible samples of a model, in a folder."""
