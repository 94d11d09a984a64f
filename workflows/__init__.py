"""The workflows, which connect the stages, and their launch plans."""
