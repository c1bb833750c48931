"""Questions to a rewritten model: what is quantized, what was observed, is it the float model."""
