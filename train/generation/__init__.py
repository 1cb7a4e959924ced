"""Text from a model: the loop, what it is loaded from, and the command `lathe generate`."""
