"""Train, test and picture one network: a LightningCLI program.

For example, Y-Drop on scikit-learn's digits:

    python -m examples.train fit --config examples/configs/base.yaml --config examples/configs/ydrop.yaml

Every run writes its checkpoints, metrics.csv, reached.json, conductance.csv and training.png into one folder under
runs/. With a --checkpoint.dirpath, one that was interrupted goes on as if it had not been: --ckpt_path names the
last.ckpt that is there.
"""

import csv
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from examples.networks import ClassifierBase
from examples.plots import draw_run
from lightning_ydrop import ExactResume, layer_conductance
from lightning_ydrop.callbacks.last_epoch import LastEpoch


class TrainCLI(LightningCLI):
    """LightningCLI with any classifier and data module of the examples, which tests the best checkpoint after fitting.

    Attributes:
        reached: What that checkpoint reached: test_acc, in [0, 1].

    """

    reached: Mapping[str, float]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has, and let the data say what goes into the network and comes out of it."""
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastEpoch, "last")
        parser.add_lightning_class_args(ExactResume, "exact")
        parser.link_arguments("checkpoint.dirpath", "last.dirpath")
        parser.link_arguments("data.shape", "model.init_args.shape", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.set_defaults({"model": {"class_path": "examples.networks.Classifier"}})

    def after_fit(self) -> None:
        """Test the best checkpoint, and write down how its conductance is spread."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a trial run keeps no checkpoints
        best = self.trainer.checkpoint_callback
        assert isinstance(best, ModelCheckpoint)
        assert best.best_model_score is not None
        (self.reached,) = self.trainer.test(self.model, self.datamodule, ckpt_path=best.best_model_path)
        assert self.trainer.log_dir is not None
        folder = Path(self.trainer.log_dir)
        val_loss = float(best.best_model_score)
        reached: dict[str, Any] = {**self.reached, "val_loss": val_loss, "epochs": self.trainer.current_epoch}
        where = self.trainer.strategy.root_device
        if where.type == "cuda":
            reached["gpu"] = torch.cuda.get_device_name(where)
        self.model.to(where)  # from which the Trainer has taken it back
        (folder / "reached.json").write_text(json.dumps(reached) + "\n")
        if self.model.hidden_layers():
            write_conductance(self.model, self.datamodule, folder / "conductance.csv")
            if (folder / "metrics.csv").exists():  # which another logger than CSVLogger does not write
                draw_run(folder, folder / "training.png")
        print(f"what the run has written is in {folder}")


def write_conductance(model: ClassifierBase, data: L.LightningDataModule, file: Path, num_samples: int = 1000) -> None:
    """Write each hidden unit's mean conductance over validation samples: a column for each layer."""
    x, y = next(iter(data.val_dataloader()))
    device = next(model.parameters()).device
    x, y = x[:num_samples].to(device), y[:num_samples].to(device)
    scores = layer_conductance(model, x, y, layers=model.hidden_layers(), n_steps=10, max_rows=256)
    columns = [values.mean(0).tolist() for values in scores.values()]
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(scores)
        writer.writerows(itertools.zip_longest(*columns))


def main(args: ArgsType = None, run: bool = True) -> TrainCLI:
    """Run the program, or with the config.yaml of a run only make again what it had."""
    return TrainCLI(
        ClassifierBase,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
        run=run,
    )


if __name__ == "__main__":
    main()
