"""Choose the domain of each training sequence."""
