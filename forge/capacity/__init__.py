"""Estimates of the memory that training and serving need."""
