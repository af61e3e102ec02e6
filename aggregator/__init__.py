"""Takes data vectors in, merges them, and releases the result."""
