"""Distil a network that was trained with dropout: a LightningCLI program.

    python -m examples.distill fit --config examples/distillation/digits.yaml --model.checkpoint BEST_OF_A_RUN

The teacher is the network of that checkpoint, which any run of examples/train.py leaves. The student's checkpoints are
those of an examples.networks.Classifier of its own.
"""

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_ydrop import DropoutDistillation


class DistillCLI(LightningCLI):
    """LightningCLI with dropout distillation and any data module."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has."""
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")


def main(args: ArgsType = None) -> DistillCLI:
    """Run the program."""
    return DistillCLI(DropoutDistillation, L.LightningDataModule, subclass_mode_data=True, args=args)


if __name__ == "__main__":
    main()
