"""A trained model and held-out rows -> scores before and after, answers, and a report that people read."""
