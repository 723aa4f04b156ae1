"""Under which strategies of a Trainer phase 1 can call the model."""

from lightning.pytorch import Trainer

from lightning_ydrop.errors import ConfigurationError

# By name over the bases: `lightning` and `pytorch_lightning` have classes of their own, and DeepSpeed's is one of DDP.
REASONS = {
    "FSDPStrategy": "FSDP1 frees gathered parameters by hooks on their gradients, which phase 1 does not compute",
    "DeepSpeedStrategy": "DeepSpeed calls the model inside an engine of its own, which phase 1 would have to bypass",
    "XLAStrategy": "XLA traces whole training steps, and phase 1 would become part of them",
    "XLAFSDPStrategy": "XLA traces whole training steps, and phase 1 would become part of them",
    "SingleDeviceXLAStrategy": "XLA traces whole training steps, and phase 1 would become part of them",
}


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which phase 1 cannot call the model.

    Raises:
        ConfigurationError: If the Trainer has one of them.

    """
    strategy = trainer.strategy
    for base in type(strategy).__mro__:
        if base.__name__ in REASONS:
            raise ConfigurationError(
                f"YDropCallback was given to a Trainer with {type(strategy).__name__}.",
                f"{REASONS[base.__name__]}.",
                'Train with strategy="ddp", or, to shard parameters, with FSDP2: '
                "ModelParallelStrategy(tensor_parallel_size=1).",
            )
    if type(strategy).__name__ == "ModelParallelStrategy":
        size = strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
        if size > 1:
            raise ConfigurationError(
                f"YDropCallback was given to a Trainer with ModelParallelStrategy(tensor_parallel_size={size}).",
                "Ranks that hold parts of one layer see parts of its units, and Y-Drop ranks whole layers.",
                "Train with ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1).",
            )
