"""Everything that leanvocab raises. Imports nothing.

LeanVocabError
├── DataError (ValueError)               data to count, or a column in it, is not what was expected
├── VocabularyError (ValueError)         a vocabulary is not valid, or does not fit what it is used with
│   └── MissingTokenError (IndexError)   an id lies outside the partial vocabulary
├── ModelError (ValueError)              a model cannot be shrunk, or not in this way
│   ├── TiedOutputError                  the input table is tied to an output layer that the task uses
│   ├── AlreadyShrunkError               shrunk twice
│   ├── NotShrunkError                   merged, or asked about, without having been shrunk
│   └── BypassError                      something reads the partial weight without going through the lookup
├── OptimizerError (RuntimeError)        an optimizer holds other parameters or states than the shrunk model needs
├── CheckpointError (ValueError)         something on disk, or in a state dict, is not what was expected
├── TrainingError (RuntimeError)         training came to something that is not worth keeping
├── InterruptedRunError                  a signal ended a run; the message says where it goes on
├── SettingsError (ValueError)           a setting is out of its range, or contradicts another
└── MissingExtraError (ImportError)      an optional dependency is not installed; the message has the pip line

LeanVocabWarning (UserWarning)           something that is not wrong, but that the user should know
"""


class LeanVocabError(Exception):
    """Base of every error that leanvocab raises."""


class DataError(LeanVocabError, ValueError):
    """Data to count, or a column in it, is not what was expected."""


class VocabularyError(LeanVocabError, ValueError):
    """A vocabulary is not valid, or does not fit what it is used with."""


class MissingTokenError(VocabularyError, IndexError):
    """An id lies outside the partial vocabulary."""


class ModelError(LeanVocabError, ValueError):
    """A model cannot be shrunk, or not in this way."""


class TiedOutputError(ModelError):
    """The input table is tied to an output layer."""


class AlreadyShrunkError(ModelError):
    """The model is shrunk already."""


class NotShrunkError(ModelError):
    """The model is not shrunk."""


class BypassError(ModelError):
    """Something reads or changes the partial weight without going through the lookup that remaps ids."""


class OptimizerError(LeanVocabError, RuntimeError):
    """An optimizer holds other parameters or states than the shrunk model needs."""


class CheckpointError(LeanVocabError, ValueError):
    """Something on disk, or in a state dict, is not what was expected."""


class TrainingError(LeanVocabError, RuntimeError):
    """Training came to something that is not worth keeping: a loss that is not finite."""


class InterruptedRunError(LeanVocabError):
    """A signal ended a run before its end."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class SettingsError(LeanVocabError, ValueError):
    """A setting is out of its range, or contradicts another."""


class MissingExtraError(LeanVocabError, ImportError):
    """An optional dependency is not installed."""


class LeanVocabWarning(UserWarning):
    """Something that is not wrong, but that the user should know: said once."""


RESIZE_FIRST = (
    "if tokens were added to the tokenizer, resize the model before: model.resize_token_embeddings(len(tokenizer))"
)


def first_line(error: BaseException) -> str:
    """The first line of another library's error, without its advice; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(value: object) -> str:
    """A value that was found, in at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
