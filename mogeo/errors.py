"""The one exception for what a user gave and can mend; knows nothing else, so that the command line can import it."""


class InputError(ValueError):
    """A file, option or model that cannot be used. `str(error)` names culprit and cure, and is shown alone."""
