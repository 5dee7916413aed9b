"""The one exception that speaks to the user."""


class InputError(Exception):
    """Something the user gave is wrong; the message is one sentence that says what and how to mend it.

    Command lines print it without a traceback and exit with status 2 (see ``cli.run``).
    """

    def __init__(self, message: str) -> None:
        # A DataLoader worker re-raises as type(error)("Caught ... Original Traceback ... InputError: message");
        # keep the sentence alone.
        super().__init__(message.rsplit("InputError: ", 1)[-1].strip())
