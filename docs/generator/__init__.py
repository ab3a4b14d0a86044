"""Makes the pages of the documentation site that are read from the code, so that nothing is copied by hand."""
