"""What a run needs, checked in seconds before anything costly: all that is wrong is reported at once."""
