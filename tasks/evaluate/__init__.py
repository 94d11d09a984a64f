"""A trained model and held-out rows -> scores against base and champion, the gate's verdict, and an HTML report."""
