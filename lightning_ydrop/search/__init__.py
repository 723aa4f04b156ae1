"""AutoDropout: a search for the dropout pattern of every layer, on one machine or several. Needs the extra `search`."""
