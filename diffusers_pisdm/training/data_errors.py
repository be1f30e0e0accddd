"""What can be wrong with a user's data, as opposed to the program."""


class DataError(ValueError):
    """The data set holds something that cannot be trained on; the message says where, and what to do."""


class BadImageError(DataError):
    """An image cannot be read."""
