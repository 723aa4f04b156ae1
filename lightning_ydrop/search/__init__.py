"""AutoDropout: a search for the dropout pattern of every layer (arXiv 2101.01761)."""
