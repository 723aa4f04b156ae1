"""AutoDropout: a controller learns which dropout pattern each place of a network should have (arXiv 2101.01761).

`places` says where patterns go, `space` which ones there are, `controller` learns to choose, and `sampler` makes an
Optuna sampler of a controller. This package imports none of them, so that Optuna stays an extra.
"""
