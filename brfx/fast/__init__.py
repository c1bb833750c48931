"""The form of a rewritten graph that trains fastest. Without this room all numbers stay the same."""
