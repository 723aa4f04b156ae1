"""Several callbacks of a kind in one Trainer, where that can't be."""

from lightning.pytorch import Callback, Trainer

from lightning_ydrop.errors import ConfigurationError


def check_alone(trainer: Trainer, kind: type[Callback], several: str, reason: str, remedy: str) -> None:
    """Refuse a Trainer with more than one callback of a kind.

    Args:
        trainer: The Trainer.
        kind: The class.
        several: What several of them are called.
        reason: Why there can be one only.
        remedy: What to do.

    Raises:
        ConfigurationError: If it has more.

    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(callback, kind) for callback in callbacks) > 1:
        raise ConfigurationError(f"The Trainer has several {several}.", reason, remedy)
