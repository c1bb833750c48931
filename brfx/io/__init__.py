"""Files of weights, read and written."""
