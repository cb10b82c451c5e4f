"""What can be wrong with a model directory. Each error says what was found and what to do about it."""


class ModelError(Exception):
    """A model directory cannot be served."""


class UnsupportedModel(ModelError):
    """The model asks for what Sluice cannot compute; everything of that kind is listed at once."""


class BrokenCheckpoint(ModelError):
    """Files of the model are missing, damaged or at odds; everything found is listed at once."""


def listed(headline: str, problems: list[str]) -> str:
    """One message for many problems, a line each."""
    return "\n".join([f"{headline}:", *(f"  - {problem}" for problem in problems)])
