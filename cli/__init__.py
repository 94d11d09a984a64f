"""The command `forge`. Commands import what they need when they run, so that `forge --help` answers at once."""
