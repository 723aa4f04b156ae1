"""Programs and YAML to start from. Run them from the root of a clone: `python -m examples.train`."""
