"""The cost of training, counted and measured in advance."""
