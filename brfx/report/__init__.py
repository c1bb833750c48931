"""A page and figures of runs, from the files in their folders."""
