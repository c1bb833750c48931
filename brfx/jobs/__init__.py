"""The command line's work: from a checkpoint and images to files to ship."""
