"""What should be served, and what makes it so."""
