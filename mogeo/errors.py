"""The exception for what a user can mend. Imports nothing, so that every other module can import it at no cost."""


class InputError(ValueError):
    """A file, an option, a setting or a model that cannot be used.

    The message names what is wrong and what to do about it. The command line prints the message alone, without a
    traceback.
    """
