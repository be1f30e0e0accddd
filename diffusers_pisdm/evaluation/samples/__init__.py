"""Sample sets: folders of reproducible samples from a model."""
