"""Real data: text and images that ship with this package, and the user's own."""
