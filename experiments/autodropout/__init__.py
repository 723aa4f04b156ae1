"""What a search for dropout patterns finds, and what that is worth."""
