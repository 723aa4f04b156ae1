"""What Y-Drop costs and what it finds: one command for each question, as `python -m benchmarks.step --help` says."""
