"""Errors a user can cause: each says what is wrong, where, and what to do, in a line or two, and sets the exit code."""


class DressageError(Exception):
    """Something the user can put right."""

    exit_code = 2


class ConfigError(DressageError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(DressageError):
    """A file or a row cannot be read as records."""


class ModelError(DressageError):
    """A model, tokenizer or adapter is absent or does not fit."""


class CheckpointError(DressageError):
    """A checkpoint is damaged, incomplete, or belongs to another run."""


class HealthError(DressageError):
    """A run was stopped because its numbers say that it does harm."""

    exit_code = 3


class EngineError(DressageError):
    """The sampler cannot do what was asked, or disagrees with the trained model."""
