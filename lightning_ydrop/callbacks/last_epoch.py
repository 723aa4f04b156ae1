"""A checkpoint of the last epoch."""

from lightning.pytorch.callbacks import ModelCheckpoint


class LastEpoch(ModelCheckpoint):
    """Keeps the last epoch in last.ckpt, beside whatever other checkpoints a program keeps.

    With `ExactResume`, a fit that goes on from it is the one that was never interrupted.

    Args:
        dirpath: Folder of last.ckpt.

    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(dirpath, "last", enable_version_counter=False)
