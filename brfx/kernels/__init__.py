"""Kernels that know no quantizer: compile options, channel sums, batch norm."""
