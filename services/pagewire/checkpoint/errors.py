"""The error of everything that reads a checkpoint."""


class Unsupported(ValueError):
    """The model asks for something that is not built, or its files are damaged; the message names
    it."""
