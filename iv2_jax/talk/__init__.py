"""A chat about a clip: in the terminal and on a local web page."""
