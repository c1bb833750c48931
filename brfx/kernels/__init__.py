"""What runs fast and knows no quantizer: compile options, channel sums, batch norm."""
