"""Models and batches that we have never seen: how to read, call and give them back as they were."""
