"""The exceptions that speak to the user."""


class InputError(Exception):
    """Something the user gave is wrong; the message is one sentence that says what and how to mend it.

    Command lines print it without a traceback and exit with ``exit_status`` (see ``cli.run``).
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        # A DataLoader worker re-raises as type(error)("Caught ... Original Traceback ... InputError: message");
        # keep the sentence alone.
        super().__init__(message.rsplit("InputError: ", 1)[-1].strip())


class MissingPackageError(InputError, ModuleNotFoundError):
    """An optional package is not installed; ``except ImportError`` and ``pytest.importorskip`` catch it too."""


class TrainingFailedError(InputError):
    """A run started well and failed."""

    exit_status = 1


class ProofFailedError(InputError):
    """A conversion is not what it was made from; nothing of it is kept."""

    exit_status = 1


class DivergedError(TrainingFailedError):
    """The loss left the finite, or the sensible."""


class PreemptedError(InputError):
    """A run was asked to stop, wrote its state and stopped; the same command goes on (sysexits' EX_TEMPFAIL)."""

    exit_status = 75
