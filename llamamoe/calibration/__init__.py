"""What the methods are shown of real text: the text, and the inputs of every FFN on it."""
