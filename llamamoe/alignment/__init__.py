"""Learn assignment and router through the whole model, comparing its predictions with the parent's."""
