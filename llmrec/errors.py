"""The errors that llmrec raises for what a user can cause.

Every one also inherits the built-in error of its kind, so `except ValueError` keeps working, and all of them inherit
`LlmrecError`, which the command line turns into one line on standard error and a non-zero exit status.
"""


class LlmrecError(Exception):
    """Base of all errors that llmrec raises on purpose."""


class DataError(LlmrecError, ValueError):
    """Interactions or items that can't be read or make no sense."""


class ItemOrderError(LlmrecError, ValueError):
    """An array about items is in another order than the catalogue, or about other items."""


class UnknownItemError(LlmrecError, KeyError):
    """An item ID that the catalogue doesn't hold."""

    def __str__(self) -> str:  # KeyError would print the message in quotes, with its line ends escaped
        return str(self.args[0]) if self.args else ""


class SettingsError(LlmrecError, ValueError):
    """A setting, or a combination of settings, that can't work."""


class MissingPartError(LlmrecError, FileNotFoundError):
    """A saved folder without one of the files it must hold."""


class WriteError(LlmrecError, OSError):
    """A file that couldn't be written: a full disk, a quota, a read-only folder."""
