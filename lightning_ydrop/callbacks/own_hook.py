"""The LightningModule's own `on_train_batch_start`, run before phase 1."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

HOOK = "on_train_batch_start"


class OwnHook:
    """Runs a LightningModule's `on_train_batch_start` before Lightning does, once for each batch.

    Lightning calls it after those of callbacks. What it sets for the batch, such as a condition or a mask, would
    otherwise not be there when phase 1 calls the model.
    """

    def __init__(self) -> None:
        self._stood_in: tuple[LightningModule, Any] | None = None

    def run_early(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> int | None:
        """Run the hook. When Lightning calls it, it returns the same answer without running again.

        Returns:
            Its answer: -1 skips the rest of the epoch.

        """
        self.give_back()
        if not is_overridden(HOOK, pl_module):
            return None
        answer: int | None = pl_module.on_train_batch_start(batch, batch_idx)

        def answer_again(batch: Any, batch_idx: int) -> int | None:
            self.give_back()
            return answer

        # On the instance, where it stands before the method of the class.
        self._stood_in = (pl_module, pl_module.__dict__.get(HOOK))
        pl_module.__dict__[HOOK] = answer_again
        return answer

    def give_back(self) -> None:
        """Let the LightningModule have its hook again."""
        if self._stood_in is not None:
            (pl_module, former), self._stood_in = self._stood_in, None
            if former is None:
                del pl_module.__dict__[HOOK]
            else:
                pl_module.__dict__[HOOK] = former
