"""Tests of llamamoe.methods.splitters."""
