"""Phase 1: how much every unit matters, for any torch model, without a trainer."""
