"""The command line: parse, build the settings, call the library once, render."""
