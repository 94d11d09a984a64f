"""What fits in which memory."""
