"""AutoDropout: where dropout patterns go in a model, and the search for them (arXiv 2101.01761)."""
