"""Draw the domain of each training sequence."""
