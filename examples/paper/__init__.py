"""The experiments of the paper: `python -m examples.paper.run`, then `report`, `figures`, `distillation` or `tune`."""
