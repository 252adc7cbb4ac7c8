"""Errors that a user can act on.

Every message is one line that names the file, the field and the remedy. The command line prints it and exits
with status 2; anything else that escapes is a bug of this package and keeps its traceback.
"""


class DataError(ValueError):
    """Bad input, a bad option, or an environment that stops the job (full disk)."""


class InputChanged(DataError):
    """The second pass over an input does not find the documents that the first one found."""


class ManifestError(DataError):
    """A shards directory whose manifest is missing, damaged or does not describe what lies beside it."""
