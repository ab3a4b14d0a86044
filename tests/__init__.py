"""The tests of llamamoe; the folders mirror the library."""
