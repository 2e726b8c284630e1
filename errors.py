"""The one family of errors a user of seqpar can see."""


class SeqparError(Exception):
    """Base class: the message says what failed, where in the user's code, and what to do next."""


class TraceError(SeqparError):
    """The model could not be traced into one graph."""


class SignatureError(SeqparError, TypeError):
    """The inputs of a call do not have the structure of the example inputs."""


class MeshError(SeqparError, ValueError):
    """Degrees, world size and device mesh do not fit together."""


class UnsupportedError(SeqparError):
    """The program contains something that cannot be run in parallel correctly; refused instead of guessed."""


class DisagreementError(SeqparError):
    """The ranks of one group hold different models, shapes or versions."""


class PlanError(SeqparError, ValueError):
    """A declared plan contradicts the model or its graph."""


class NoPlanError(UnsupportedError):
    """No declared plan is equivalent to the compiled program; the text says which line stands in the way, and what to extract."""


class SavedProgramError(SeqparError, ValueError):
    """A program cannot be written to a file, or a file holds no program for this model, these versions or these ranks."""
