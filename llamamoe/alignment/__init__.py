"""Assignment and router learned through the whole model: its predictions are held against the parent's."""
