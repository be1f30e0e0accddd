"""The networks that extract features for evaluation."""
